"""The Java programs inside pycocoevalcap: PTB tokenization, METEOR and SPICE, each in a process of its own.

All run with the locale of the United States, because a decimal comma breaks METEOR, and with UTF-8.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "pycocoevalcap"
INSTALL = "pip install pycocoevalcap==1.2"
SPICE_MODELS = "python -m pycocoevalcap.spice.get_stanford_models"
TIMEOUT_SECONDS = 1800.0
_FLAGS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8"
# SPICE's serializer looks into classes of the JDK, which Java 16 and newer refuse. Java 8 does not read this variable.
_OPENED = " ".join(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in ("lang", "util", "math", "nio", "text"))
# Where Java fails, the package keeps its lock, and its __del__ would wait for that lock for ever.
_METEOR_PROGRAM = """
import json, os, sys
from pycocoevalcap.meteor import meteor
meteor.METEOR_JAR = sys.argv[1]
found, wanted = json.load(sys.stdin)
number = range(len(found))
program = meteor.Meteor()
try:
    score = program.compute_score({i: wanted[i] for i in number}, {i: [found[i]] for i in number})
except (OSError, ValueError) as error:
    program.meteor_p.kill()
    said = program.meteor_p.stderr.read().decode(errors="replace")
    print(said or f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
json.dump(score, sys.stdout)
"""


class MetricMissing(RuntimeError):
    """A metric that cannot be had here; the message is one line that says why and what helps."""


def package_folder() -> Path:
    """Where pycocoevalcap is installed. Raises MetricMissing, with the command that installs it."""
    if (spec := find_spec(PACKAGE)) is None or not spec.submodule_search_locations:
        raise MetricMissing(f"{PACKAGE} is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def ptb_tokenize(texts: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """Each text as words with spaces between them: Stanford's PTB tokens, lower case, without the package's marks.

    White space of any kind becomes a space first: the program takes some of it, like U+2028, for the end of a text.
    Raises MetricMissing.
    """
    folder = package_folder() / "tokenizer"
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    command = ["-cp", str(folder / STANFORD_CORENLP_3_4_1_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "\n".join(" ".join(text.split()) for text in texts)  # no line break at the end, as the package does it
    output = _run([_java(), *command, "-preserveLines", "-lowerCase"], lines, timeout_seconds, "PTB tokenization")
    tokenized = output.split("\n")
    assert len(tokenized) == len(texts), f"{len(texts)} captions became {len(tokenized)} lines"
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS) for line in tokenized]


def meteor(
    captions: Sequence[str], references: Sequence[Sequence[str]], timeout_seconds: float = TIMEOUT_SECONDS
) -> tuple[float, list[float]]:
    """METEOR 1.5 of tokenized captions: of all together, which is not the mean, and of each. Raises MetricMissing."""
    folder = package_folder() / "meteor"
    _java()
    clean = [_one_field(caption) for caption in captions], [list(map(_one_field, of_image)) for of_image in references]
    with tempfile.TemporaryDirectory(prefix="meteor-") as name:  # beside a path with a space it finds no data
        try:
            jar = Path(shutil.copy(folder / "meteor-1.5.jar", name))
        except OSError as error:
            raise MetricMissing(f"METEOR could not be started: {error}") from error
        (jar.parent / "data").symlink_to(folder / "data")
        output = _run([sys.executable, "-c", _METEOR_PROGRAM, str(jar)], json.dumps(clean), timeout_seconds, "METEOR")
    score, scores = json.loads(output)
    return score, scores


def _one_field(text: str) -> str:
    """A text without METEOR's separator of fields."""
    return " ".join(text.replace("|||", " ").split())


def spice(
    captions: Sequence[str], references: Sequence[Sequence[str]], timeout_seconds: float = TIMEOUT_SECONDS
) -> list[float]:
    """SPICE's F-score of each tokenized caption; NaN where neither it nor its references say anything.

    The cache of parsed references lives as long as the call: a shared one is damaged by jobs side by side. Raises
    MetricMissing, also where Stanford's models, a download of their own, are not there.
    """
    folder = package_folder() / "spice"
    if not list(folder.glob("lib/stanford-corenlp-*-models.jar")):
        raise MetricMissing(f"SPICE's parser models are not installed (a download of 400 MB): {SPICE_MODELS}")
    java = _java()
    items = [
        {"image_id": number, "test": caption, "refs": list(of_image)}
        for number, (caption, of_image) in enumerate(zip(captions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="spice-") as name:
        given, found, cache = (Path(name) / part for part in ("in.json", "out.json", "cache"))
        given.write_text(json.dumps(items))
        cache.mkdir()
        command = [java, "-jar", "-Xmx8G", "spice-1.0.jar", str(given), "-cache", str(cache), "-out", str(found)]
        _run([*command, "-subset", "-silent"], "", timeout_seconds, "SPICE", folder)
        results = {result["image_id"]: result["scores"]["All"]["f"] for result in json.loads(found.read_text())}
    assert results.keys() == set(range(len(captions))), f"SPICE gave {len(results)} of {len(captions)} scores"
    return [_number(results[number]) for number in range(len(captions))]  # its output is sorted, by text perhaps


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _java() -> str:
    if (java := shutil.which("java")) is None:
        raise MetricMissing("no `java` on the PATH: install a Java runtime, for example apt-get install default-jre")
    return java


def _run(command: list[str], given: str, timeout_seconds: float, what: str, folder: Path | None = None) -> str:
    flags = {"JAVA_TOOL_OPTIONS": _FLAGS, "JDK_JAVA_OPTIONS": _OPENED}
    environment = os.environ | {name: f"{os.environ.get(name, '')} {value}".strip() for name, value in flags.items()}
    try:
        done = subprocess.run(
            command, input=given.encode(), capture_output=True, timeout=timeout_seconds, env=environment, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise MetricMissing(f"{what} had not ended after {timeout_seconds:g} s") from error
    except OSError as error:
        raise MetricMissing(f"{what} could not be started: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").splitlines()
        said = [line for line in lines if line[:1].strip() and not line.startswith(("Picked up", "NOTE: Picked up"))]
        raise MetricMissing(f"{what} ended with code {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return done.stdout.decode()
