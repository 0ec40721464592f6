"""README.md of an exported folder: the model card, of what the run itself knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor

from pipeline.config.options import weighted_paths
from pipeline.exported.folder import ADAPTER, LANGUAGE, TOWER
from pipeline.exporting.comparing import Rounding
from pipeline.exporting.published import version, without_place
from pipeline.exporting.samples import Sample
from pipeline.exporting.source import Source

CAPTION, ANSWER, MATCH = (
    'model.caption("picture.jpg")',
    'model.answer("picture.jpg", "what is it?")',
    'model.match("picture.jpg", "a dog on the beach")',
)
KINDS = {  # task -> what it is in words, tag of the hub, line of code
    "pretraining": ("pretrained on pictures with captions", "image-to-text", CAPTION),
    "captioning": ("that writes captions of pictures", "image-to-text", CAPTION),
    "vqa": ("that answers questions about pictures", "visual-question-answering", ANSWER),
    "gqa": ("that answers questions about pictures", "visual-question-answering", ANSWER),
    "okvqa": ("that answers questions about pictures", "visual-question-answering", ANSWER),
    "nlvr2": ("that judges whether a text is true of two pictures", None, "model.abilities"),
    "snli_ve": ("that judges whether a picture entails a text", None, "model.abilities"),
    "retrieval": ("that ranks texts by how well they describe a picture", None, MATCH),
}
PARTS = {
    TOWER: "the vision tower by the names of the library it comes from",
    LANGUAGE: "the frozen language model, for transformers' `AutoModelForCausalLM.from_pretrained`",
    ADAPTER: "the LoRA of the language model, for peft's `PeftModel.from_pretrained`",
}
UNKNOWN = "unknown"


@dataclass
class Facts:
    """What an export found out: the samples that were compared and the run's outputs of them, ``change`` by rounding
    to ``dtype``, numbers of weights; ``parts`` and ``graphs`` that were written."""

    dtype: str
    licence: str | None
    samples: list[Sample]
    compared_with: str
    outputs: Mapping[str, Tensor]
    change: Rounding | None
    num_trained: int
    num_frozen: int
    parts: list[str] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)

    @property
    def compared(self) -> str:
        """The comparison in words."""
        names = ", ".join(name for name in self.outputs if name.startswith("logits")) or ", ".join(self.outputs)
        words = f"{names} of {self.compared_with} are equal bit for bit to those of the run's checkpoint (fp32, CPU)"
        if self.change is None:
            return words
        return (
            f"{words} with its weights rounded to {self.dtype}; rounding moves a logit by up to"
            f" {self.change.largest:.2g} and the most probable one of {self.change.changed:.1%} of the targets"
        )


def model_card(source: Source, facts: Facts) -> str:
    """YAML front matter as the hub reads it, then sections for people."""
    what, _, line = KINDS[source.config.task.name]
    sections = (
        f"---\n{yaml.safe_dump(_front_matter(source, facts), sort_keys=False, allow_unicode=True)}---\n",
        f"# {source.name}\n\nA vision-language model {what} (task `{source.config.task.name}`, objective"
        f" `{source.config.objective.name}`), trained with OpenFLM.",
        f'## Use\n\n```python\nimport openflm\n\nmodel = openflm.load("FOLDER")  # this folder\nprint({line})\n```\n\n'
        "`python -m pipeline.generate --run FOLDER picture.jpg` and `python -m pipeline.evaluate --run FOLDER --data"
        " DIR` read it like a run.",
        f"## What is in it\n\n{_contents(source, facts)}",
        f"## Training\n\n{_training(source)}",
        f"## Data\n\n{_data(source)}",
        f"## Scores\n\n{_scores(source)}",
        f"## Checked\n\nWhen the folder was written it was loaded again, and the {facts.compared}. `openflm.json` lists"
        " the SHA-256 of every file but this one; a folder that does not match is refused.",
        f"## Limits\n\n{_limits(source, facts)}",
    )
    return "\n\n".join(part.strip("\n") for part in sections) + "\n"


def _front_matter(source: Source, facts: Facts) -> dict[str, Any]:
    tag = KINDS[source.config.task.name][1]
    found: dict[str, Any] = {
        "license": facts.licence or UNKNOWN,
        "library_name": "openflm",
        "tags": ["openflm", "vision-language", source.config.objective.name, source.config.task.name],
    }
    found |= {"pipeline_tag": tag} if tag else {}
    found |= {"datasets": names} if (names := _datasets(source)) else {}
    metrics = dict.fromkeys(name for card in source.scorecards for name in card["metrics"])
    found |= {"metrics": list(metrics)} if metrics else {}
    results = [_result(source, card) for card in source.scorecards]
    return found | ({"model-index": [{"name": source.name, "results": results}]} if results else {})


def _result(source: Source, card: Mapping[str, Any]) -> dict[str, Any]:
    """One scorecard as the hub's model-index has it."""
    corpora = "+".join(map(str, card.get("corpora", []))) or UNKNOWN
    values = [{"type": name, "name": name, "value": value} for name, value in card["metrics"].items()]
    kind = KINDS.get(card.get("task"), (None, None, None))[1] or card.get("task")
    return {
        "task": {"type": kind, "name": card.get("task")},
        "dataset": {"type": corpora, "name": corpora, "split": card.get("split")},
        "metrics": values,
    }


def _datasets(source: Source) -> list[str]:
    corpora = source.state.fingerprint.get("data", {}).get("corpora", {})
    named = dict.fromkeys(name.split(" ")[-1].partition("/")[0] for name in corpora)
    return list(named)


def _contents(source: Source, facts: Facts) -> str:
    frozen = f", {facts.num_frozen:,} frozen" if facts.num_frozen else ""
    lines = [
        f"* `model.safetensors`: {facts.num_trained:,} trained weights{frozen}, {facts.dtype}",
        *(f"* `{name}/`: {PARTS[name]}" for name in facts.parts),
        "* `config.json`: all settings of model, objective, task and training",
        "* `tokenizer.json`, `preprocessor_config.json`: how texts and pictures are read",
        *(f"* `{name}`: the file of the task's option `{option}`" for name, (_, option) in source.files.items()),
        *(f"* `{name}`: the vision tower as a graph" for name in facts.graphs),
    ]
    if facts.num_frozen and TOWER not in facts.parts and LANGUAGE not in facts.parts:
        lines.append("* not in it: the frozen parts, which are loaded by the names in config.json and compared by hash")
    return "\n".join(lines)


def _training(source: Source) -> str:
    environment, optim, state = source.environment, source.config.optim, source.state
    if not state.step:
        return "Made from an imported model; how it was trained is not known."
    versions = environment.get("versions") or {}
    rows = {
        "recipe": environment.get("recipe"),
        "steps": f"{state.step:,} of {optim.batch_size:,} samples, {state.samples_seen:,} in all",
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, weight decay {optim.weight_decay:g}",
        "precision": environment.get("precision"),
        "hardware": f"{environment.get('world_size')} x {environment.get('device_name')}",
        "starting weights": _starting(environment),
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "openflm": version(),
        "code revision": environment.get("git_revision"),
        "seed": source.config.train.seed,
    }
    return "\n".join(f"* {name}: {value}" for name, value in rows.items() if value not in (None, "", "None x None"))


def _starting(environment: Mapping[str, Any]) -> str:
    found = environment.get("starting_weights") or {}
    taken = {name: one.get("taken") for name, one in found.items() if isinstance(one, dict)}
    return ", ".join(f"{name} {without_place(str(one)) if one else 'random'}" for name, one in taken.items())


def _data(source: Source) -> str:
    corpora = source.state.fingerprint.get("data", {}).get("corpora", {})
    lines = [
        f"* {name.split(' ')[-1]}: {one.get('rows', 0):,} rows in {one.get('shards')} shards, SHA-256 of their content"
        f" `{one.get('content')}`"
        for name, one in corpora.items()
        if isinstance(one, dict)
    ]
    named = ", ".join(without_place(str(path)) for path, _ in weighted_paths(source.config.data))
    return "\n".join(lines) or f"Trained on {named or UNKNOWN}; the run kept no fingerprint of it."


def _scores(source: Source) -> str:
    if not source.scorecards:
        return "The run holds no scorecard of this checkpoint (`python -m pipeline.evaluate --run RUN` makes one)."
    lines = ["| task | data | items | metric | value |", "|---|---|---|---|---|"]
    for card in source.scorecards:
        data = f"{'+'.join(map(str, card.get('corpora', [])))}/{card.get('split')}"
        errors = card.get("standard_errors") or {}
        for name, value in card["metrics"].items():
            shown = (
                UNKNOWN
                if value is None
                else f"{value:.4g}" + (f" ± {errors[name]:.2g}" if errors.get(name) is not None else "")
            )
            lines.append(f"| {card.get('task')} | {data} | {card.get('items')} | {name} | {shown} |")
    return "\n".join(lines) + "\n\n± is one standard error. How each number is made: `scorecard.json` of the run."


def _limits(source: Source, facts: Facts) -> str:
    lines = [
        "* It was compared on the samples named above only; scores hold for the data named beside them.",
        "* It says what such data taught it, mistakes and prejudices included, and was not tested for safety.",
    ]
    if facts.licence is None:
        lines.append("* No licence was given: that of the data and of the starting weights is to be looked up.")
    if facts.dtype != "float32":
        lines.append(f"* Its weights are rounded to {facts.dtype}; scores above are those before rounding.")
    if source.config.model.vision.frozen or LANGUAGE in facts.parts:
        lines.append("* Frozen parts are the work of others, under their own licences.")
    return "\n".join(lines)
