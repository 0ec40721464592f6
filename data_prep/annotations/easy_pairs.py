"""Makes statements on pairs of easy-VQA's images, in NLVR2's form: each sentence with two true and two false pairs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.easy_vqa import COLOURS, SHAPES, colour_and_shape
from data_prep.record import PrepError

Kind = tuple[str, str]  # colour and shape
KindPair = tuple[Kind, Kind]
PAIRS_OF_A_SENTENCE = 4  # half of them true, as in NLVR2
_TRIES = 100


@dataclass(frozen=True)
class Sentence:
    """A statement about the left and the right image, and whether it is true of two kinds of shape."""

    template: str
    text: str
    is_true: Callable[[Kind, Kind], bool]


def sentences() -> list[Sentence]:
    """Every sentence of every template; those of a template stand together."""
    return [Sentence(template, f"{text}.", is_true) for template, text, is_true in _sentences()]


def _sentences() -> Iterator[tuple[str, str, Callable[[Kind, Kind], bool]]]:
    for name, of in _descriptions():
        yield "both", f"both images show a {name}", lambda a, b, of=of: of(a) and of(b)
        yield "left", f"the left image shows a {name}", lambda a, b, of=of: of(a)
        yield "right", f"the right image shows a {name}", lambda a, b, of=of: of(b)
        yield "one", f"exactly one image contains a {name}", lambda a, b, of=of: of(a) != of(b)
        yield "any", f"at least one image contains a {name}", lambda a, b, of=of: of(a) or of(b)
        yield "none", f"neither image contains a {name}", lambda a, b, of=of: not of(a) and not of(b)
    for one, other in itertools.product(itertools.product(COLOURS, SHAPES), repeat=2):
        text = f"the left image shows a {' '.join(one)} and the right image shows a {' '.join(other)}"
        yield "each", text, lambda a, b, one=one, other=other: (a, b) == (one, other)
    for number, what in enumerate(("color", "shape")):
        noun = "shapes" if number == 0 else "images"
        yield "same", f"the two {noun} have the same {what}", lambda a, b, n=number: a[n] == b[n]
        yield "different", f"the two {noun} have different {what}s", lambda a, b, n=number: a[n] != b[n]


def _descriptions() -> Iterator[tuple[str, Callable[[Kind], bool]]]:
    for colour in COLOURS:
        yield f"{colour} shape", lambda kind, colour=colour: kind[0] == colour
    for shape in SHAPES:
        yield shape, lambda kind, shape=shape: kind[1] == shape
    for kind in itertools.product(COLOURS, SHAPES):
        yield " ".join(kind), lambda found, kind=kind: found == kind


def make_pairs(images: AnnotatedSplit, num_statements: int, seed: int = 0, per_pair: int = 1) -> AnnotatedSplit:
    """``num_statements`` on pairs of a split's images, up to ``per_pair`` on each, drawn by ``seed`` and the split.

    Templates take turns, and within a template its sentences. One false pair of two differs from a true one in a single
    colour or shape. Images whose colour or shape their questions leave open are not used. Raises PrepError for a number
    that is no multiple of 4, for questions that contradict each other, and where the images are too few.
    """
    if num_statements < PAIRS_OF_A_SENTENCE or num_statements % PAIRS_OF_A_SENTENCE:
        raise PrepError(f"{num_statements} {images.split} statements: expected a multiple of {PAIRS_OF_A_SENTENCE}")
    of_kind = _by_kind(images)
    pairs = _Pairs(random.Random(f"easy_pairs/{seed}/{images.split}"), of_kind, per_pair)
    turns = _turns(pairs.rng, of_kind)
    found: list[Annotated] = []
    for number in range(num_statements // PAIRS_OF_A_SENTENCE):
        sentence, true, false = next(turns, (None, [], []))
        drawn = [] if sentence is None else pairs.draw_set(sentence, true, false)
        if sentence is None or not drawn:
            known = sum(map(len, of_kind.values()))
            raise PrepError(
                f"{images.split}: {known} images of known colour and shape are too few for {num_statements} statements"
            )
        for place, (pair, label) in enumerate(drawn):
            name = f"{images.split}-{number}-{place}"
            if not pair.captions:
                pair.key = name
                found.append(pair)
            pair.add(sentence.text, label=str(label), identifier=f"{name}-0", template=sentence.template)
    counts = {"statements": num_statements, "sentences": len({text for pair in found for text in pair.captions})}
    return AnnotatedSplit(images.split, found, [], counts)


def _by_kind(images: AnnotatedSplit) -> dict[Kind, list[Annotated]]:
    of_kind: dict[Kind, list[Annotated]] = {}
    for image in images.images:
        try:
            colour, shape = colour_and_shape(image)
        except ValueError as error:
            raise PrepError(f"{images.split}: {error}; download easy-VQA again") from error
        if colour is not None and shape is not None:
            of_kind.setdefault((colour, shape), []).append(image)
    return of_kind


def _turns(
    rng: random.Random, of_kind: dict[Kind, list[Annotated]]
) -> Iterator[tuple[Sentence, list[KindPair], set[KindPair]]]:
    """Sentences without end, templates in turn, each with the pairs of kinds that make it true and those that don't."""
    pairs = [
        pair
        for pair in itertools.product(of_kind, repeat=2)
        if len(of_kind[pair[0]]) > (1 if pair[0] == pair[1] else 0)
    ]
    queues: dict[str, list[tuple[Sentence, list[KindPair], set[KindPair]]]] = {}
    for sentence in sentences():
        true = [pair for pair in pairs if sentence.is_true(*pair)]
        if 0 < len(true) < len(pairs):
            queues.setdefault(sentence.template, []).append((sentence, true, set(pairs) - set(true)))
    for queue in queues.values():
        rng.shuffle(queue)
    for turn in itertools.count() if queues else ():
        yield from (queue[turn % len(queue)] for queue in queues.values())


class _Pairs:
    """Draws image pairs for sentences; one that may have more statements is taken before a new one is made."""

    def __init__(self, rng: random.Random, of_kind: dict[Kind, list[Annotated]], per_pair: int) -> None:
        self.rng, self._of_kind, self._per_pair = rng, of_kind, per_pair
        self._with_room: dict[KindPair, list[Annotated]] = {}
        self._used: set[tuple[str, ...]] = set()  # a text and the identities of its images

    def draw_set(self, sentence: Sentence, true: list[KindPair], false: set[KindPair]) -> list[tuple[Annotated, bool]]:
        """Two true and two false pairs of images for a sentence, in random order; [] where no unused ones are left."""
        ordered = sorted(false)
        drawn = []
        for label, near in ((True, False), (True, False), (False, True), (False, False)):
            for _ in range(_TRIES):
                kinds = self.rng.choice(true if label else ordered)
                if near:
                    kinds = _near_miss(self.rng, true, false) or kinds
                if pair := self._unused(sentence.text, kinds):
                    drawn.append((pair, label))
                    break
            else:
                return []
        self.rng.shuffle(drawn)
        return drawn

    def _unused(self, text: str, kinds: KindPair) -> Annotated | None:
        """A pair of these kinds that has not had this text; None where the draw fell on one that had."""
        pairs = [each for each in self._with_room.get(kinds, ()) if len(each.captions) < self._per_pair]
        pair = next((each for each in pairs if (text, *each.identities) not in self._used), None)
        if pair is None:
            left, right = (self.rng.choice(self._of_kind[kind]) for kind in kinds)
            pair = Annotated("", left.images + right.images, left.identities + right.identities)
            if left is right or (text, *pair.identities) in self._used:
                return None
            pairs.append(pair)
        self._with_room[kinds] = pairs
        self._used.add((text, *pair.identities))
        return pair


def _near_miss(rng: random.Random, true: list[KindPair], false: set[KindPair]) -> KindPair | None:
    """A pair that is false and differs from a true one in the colour or the shape of one image."""
    for _ in range(_TRIES):
        values = [value for kind in rng.choice(true) for value in kind]
        place = rng.randrange(4)
        values[place] = rng.choice(SHAPES if place % 2 else COLOURS)
        pair = (values[0], values[1]), (values[2], values[3])
        if pair in false:
            return pair
    return None
