"""What the endpoints take and give, as the OpenAPI description says it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Caption(BaseModel):
    caption: str


class Answer(BaseModel):
    answer: str
    probability: float | None = Field(description="None where the model writes its answers")


class Answers(BaseModel):
    answers: list[Answer]


class Match(BaseModel):
    text: str
    score: float


class Matches(BaseModel):
    meaning: str = Field(description="what a score is")
    matches: list[Match]


class Result(BaseModel):
    number: int
    name: str
    score: float


class Results(BaseModel):
    results: list[Result]
    indexed: int
    total: int | None


class Status(BaseModel):
    total: int | None = Field(description="pictures in the folder; null until it has been listed")
    indexed: int
    refused: int = Field(description="files that are no usable pictures")
    done: bool


class WordMaps(BaseModel):
    words: list[str]
    maps: list[list[list[float]]] = Field(description="[words, rows, columns], over the centre square of the picture")


class MergeMap(BaseModel):
    merges: list[list[int]] = Field(description="[rows, columns], over the centre square; equal numbers were merged")


class ModelCard(BaseModel):
    name: str
    task: str
    objective: str
    image_size: int = Field(description="px")
    abilities: dict[str, bool]
    max_bytes: int
    max_pixels: int


class Health(BaseModel):
    status: str


class Query(BaseModel):
    text: str = Field(max_length=1000, min_length=1, description="what the pictures should show")
    top: int = Field(20, ge=1, le=100, description="results at most")


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
CAPTION_FIELDS = {
    "prompt": TEXT | {"description": "what the caption begins with"},
    "beams": WHOLE | {"description": "width of the search, 1 to 10 (default: the model's)"},
    "max_tokens": WHOLE | {"description": "longest caption, 1 to 256 tokens (default: the model's)"},
}
ANSWER_FIELDS = {
    "question": TEXT | {"description": "about the picture"},
    "top": WHOLE | {"description": "answers, likeliest first, 1 to 20 (default 1)"},
}
MATCH_FIELDS = {"text": TEXT | {"description": "a description to judge; up to 32 of them"}}
ATTENTION_FIELDS = {"text": TEXT | {"description": "the sentence whose words are looked up in the picture"}}


def takes_picture(fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part of an OpenAPI operation that says: a picture and ``fields``, as a form or as bytes with a query."""
    image = {"image": {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF or BMP"}}
    form = {"type": "object", "properties": image | fields, "required": ["image"]}
    raw = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": form}, "image/*": raw}, "required": True}}


def takes_query() -> dict[str, Any]:
    """The same for a body that is a ``Query`` in JSON."""
    return {"requestBody": {"content": {"application/json": {"schema": Query.model_json_schema()}}, "required": True}}
