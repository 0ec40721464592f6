"""The task of OK-VQA: questions that ask for knowledge, scored by VQA's evaluator, also by kind of knowledge.

# NOTE release of EVLGen: it lemmatises nouns and verbs of an answer by spaCy before it is scored; here: no answer is.
"""

from __future__ import annotations

from functools import partial

from pipeline.finetuning.vqa import JUDGED, VQA, summarise


def okvqa() -> VQA:
    """OK-VQA: as VQA, with the accuracy of each kind of knowledge."""
    return VQA(JUDGED._replace(summarise=partial(summarise, by="question_type")))
