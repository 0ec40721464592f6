"""All verbs of the command line: a line of help, their options, the function that runs them."""

from __future__ import annotations

from data_prep.verbs.annotation import ANNOTATION_VERBS
from data_prep.verbs.checks import add_info, add_overlap, add_verify, run_info, run_overlap, run_verify
from data_prep.verbs.drawn import add_synth, run_synth
from data_prep.verbs.flickr8k import add_flickr8k, run_flickr8k
from data_prep.verbs.options import Verb
from data_prep.verbs.tokenizer import add_tokenizer, run_tokenizer
from data_prep.verbs.upload import add_upload, run_upload
from data_prep.verbs.urls import add_urls, run_urls
from data_prep.verbs.video import VIDEO_VERBS

VERBS: dict[str, Verb] = {
    "synth": ("make the synthetic corpora (no network, no files needed)", add_synth, run_synth),
    "urls": ("download a table of URLs and captions through img2dataset", add_urls, run_urls),
    "flickr8k": ("prepare Flickr8k from its images, captions and split lists", add_flickr8k, run_flickr8k),
    **ANNOTATION_VERBS,
    **VIDEO_VERBS,
    "tokenizer": ("train a byte-level BPE from prepared captions", add_tokenizer, run_tokenizer),
    "verify": ("reopen, re-hash, recount and decode everything", add_verify, run_verify),
    "info": ("describe prepared data: counts, sizes, captions, rejected records", add_info, run_info),
    "upload": ("bring prepared data to an object store", add_upload, run_upload),
    "overlap": ("name images of training splits that stand in held-out splits", add_overlap, run_overlap),
}
