"""The endpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from pipeline.batching.questions import Answers, Attention, Captions, Matches, Merges
from pipeline.serving import forms
from pipeline.serving.pages import docs_page, front_page, policy
from pipeline.serving.picture_folder import PictureFolder
from pipeline.serving.service import Service
from pipeline.serving.uploads import Upload, first, whole

MAX_BEAMS, MAX_TOKENS, MAX_ANSWERS, MAX_TEXTS = 10, 256, 20, 32


def build_app(service: Service) -> tuple[FastAPI, str]:
    """The application, and the Content-Security-Policy of its pages."""
    app = FastAPI(title="OpenFLM", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    picture = forms.takes_picture
    for path, endpoint, model, extra in (
        ("/caption", caption, forms.Caption, picture(forms.CAPTION_FIELDS)),
        ("/answer", answer, forms.Answers, picture(forms.ANSWER_FIELDS)),
        ("/match", match, forms.Matches, picture(forms.MATCH_FIELDS)),
        ("/attention", attention, forms.WordMaps, picture(forms.ATTENTION_FIELDS)),
        ("/merges", merges, forms.MergeMap, picture({})),
        ("/search", search, forms.Results, forms.takes_query()),
    ):
        app.post(path, response_model=model, openapi_extra=extra)(endpoint)
    app.get("/search/status", response_model=forms.Status)(search_status)
    app.get("/search/pictures/{number}", response_class=Response)(search_picture)
    app.get("/model", response_model=forms.ModelCard)(model_card)
    app.get("/health", response_model=forms.Health)(health)
    app.get("/metrics", response_class=PlainTextResponse)(metrics)
    pages = {"/": front_page(), "/docs": docs_page(app.openapi())}
    for path, text in pages.items():
        app.get(path, include_in_schema=False)(_page(text))
    app.add_exception_handler(RequestValidationError, _one_line)
    return app, policy(*pages.values())


def _page(text: str) -> Callable[[], Any]:
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    return page


async def _one_line(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"detail": _reason(error)}, 422)


def _reason(error: RequestValidationError | ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())[:300]


def _service(request: Request) -> Service:
    return request.app.state.service


def _need(service: Service, ability: str, what: str) -> None:
    if not getattr(service.worker.abilities, ability):
        raise HTTPException(404, f"this model can't {what}; GET /model says what it can")


async def caption(request: Request, stream: bool = False) -> Any:
    """A caption of the picture. With ?stream=true server-sent events: each is {"caption": so far}, the last is named
    "done"; or, if it fails, "error" with {"detail": why}."""
    service = _service(request)
    _need(service, "caption", "write captions")
    if stream:
        return await _caption_stream(service, request)
    async with service.uploads.room():
        upload = await service.uploads.read(request)
        return {"caption": await service.ask(request, _captions(upload), upload.picture)}


def _captions(upload: Upload) -> Captions:
    beams = whole(upload.fields, "beams", None, MAX_BEAMS)
    return Captions(first(upload.fields, "prompt"), beams, whole(upload.fields, "max_tokens", None, MAX_TOKENS))


async def _caption_stream(service: Service, request: Request) -> Response:
    service.uploads.admit()
    with ExitStack() as admitted:
        admitted.callback(service.uploads.release)
        upload = await service.uploads.read(request)
        asked = _captions(upload)
        if (asked.beams or 1) > 1:
            raise HTTPException(422, "a stream is written word by word, without beams; leave out beams or stream")
        values = service.values(
            request, lambda model: model.caption_stream(upload.picture, asked.prompt, max_tokens=asked.max_tokens)
        )
        begin = await anext(values, "")  # so that what the model refuses has its own code
        admitted.pop_all()  # released when the stream ends
    return _Events(_events(begin, values), service.uploads.release)


async def _events(text: str, values: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(values):
        try:
            yield f"data: {json.dumps({'caption': text})}\n\n"
            async for text in values:
                yield f"data: {json.dumps({'caption': text})}\n\n"
            yield f"event: done\ndata: {json.dumps({'caption': text})}\n\n"
        except HTTPException as error:
            yield f"event: error\ndata: {json.dumps({'detail': error.detail})}\n\n"


class _Events(StreamingResponse):
    """Server-sent events (HTML standard, 9.2); ``end`` is called however the response ends."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._events, self._end = events, end

    async def __call__(self, *channel: Any) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(*channel)
        finally:
            self._end()


async def answer(request: Request) -> Any:
    """The likeliest answers to a question about the picture."""
    service = _service(request)
    _need(service, "answer", "answer questions")
    async with service.uploads.room():
        upload = await service.uploads.read(request)
        question, top = first(upload.fields, "question"), whole(upload.fields, "top", 1, MAX_ANSWERS)
        if not question:
            raise HTTPException(422, "no question; send it as the field question")
        answers = await service.ask(request, Answers(top), (upload.picture, question))
    return {"answers": [{"answer": text, "probability": probability} for text, probability in answers]}


async def match(request: Request) -> Any:
    """How well each text describes the picture."""
    service = _service(request)
    _need(service, "match", "judge descriptions")
    async with service.uploads.room():
        upload = await service.uploads.read(request)
        texts = upload.fields.get("text", [])
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise HTTPException(422, f"found {len(texts)} texts; send 1 to {MAX_TEXTS} fields named text")
        texts = [first({"text": [text]}, "text") for text in texts]
        scores = await service.ask(request, Matches(), (upload.picture, texts))
    matches = [{"text": text, "score": score} for text, score in zip(texts, scores)]
    return {"meaning": service.worker.model.match_meaning, "matches": matches}


async def attention(request: Request) -> Any:
    """Where each word of a sentence looked in the picture."""
    service = _service(request)
    _need(service, "attention", "show where words looked")
    async with service.uploads.room():
        upload = await service.uploads.read(request)
        text = first(upload.fields, "text")
        if not text:
            raise HTTPException(422, "no text; send it as the field text")
        return await service.ask(request, Attention(), (upload.picture, text))


async def merges(request: Request) -> Any:
    """Which patches of the picture the model merged into one."""
    service = _service(request)
    _need(service, "merges", "show merged patches: it merges none")
    async with service.uploads.room():
        upload = await service.uploads.read(request)
        return {"merges": await service.ask(request, Merges(), upload.picture)}


def _folder(service: Service) -> PictureFolder:
    if service.folder is None:
        raise HTTPException(404, "no folder to search; start the server with --search DIR")
    return service.folder


async def search(request: Request) -> Any:
    """The pictures of the folder that a sentence describes best, among those indexed so far."""
    service = _service(request)
    folder = _folder(service)
    async with service.uploads.room():
        try:
            query = forms.Query.model_validate_json(await service.uploads.read_body(request))
        except ValidationError as error:
            raise HTTPException(422, _reason(error)) from None
        found = []
        async with aclosing(service.values(request, lambda _: folder.searching(query.text, query.top))) as steps:
            async for so_far in steps:
                found = so_far
    status = folder.status()
    results = [dataclasses.asdict(one) for one in found]
    return {"results": results, "indexed": status["indexed"], "total": status["total"]}


async def search_status(request: Request) -> Any:
    """How far the folder is indexed."""
    return _folder(_service(request)).status()


async def search_picture(request: Request, number: int, size: str = "small") -> Response:
    """A picture of the folder as JPEG, its longer side 320 px, or 1024 with ?size=large."""
    service = _service(request)
    folder = _folder(service)
    if size not in ("small", "large"):
        raise HTTPException(422, f"found size {size[:20]!r}; expected small or large")
    return Response(await service.uploads.decoded(folder.jpeg, number, size), media_type="image/jpeg")


async def model_card(request: Request) -> Any:
    """What is served and what it can do."""
    service = _service(request)
    model, limits = service.worker.model, service.limits
    abilities = dataclasses.asdict(service.worker.abilities)
    abilities["search"] &= service.folder is not None
    card = {name: getattr(model, name) for name in ("name", "task", "objective", "image_size")}
    return card | {"abilities": abilities, "max_bytes": limits.bytes, "max_pixels": limits.pixels}


async def health(request: Request) -> Any:
    """200 when the model is loaded, 503 before and while the server ends."""
    state = _service(request).state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Counts in the text format of Prometheus."""
    return PlainTextResponse(_service(request).metrics.text(), media_type="text/plain; version=0.0.4")
