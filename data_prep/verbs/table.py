"""All verbs of the command line: a line of help, their options, the function that runs them."""

from __future__ import annotations

from data_prep.options.origin_hints import with_origins
from data_prep.options.shared import Verb
from data_prep.options.store_outputs import with_store_outputs
from data_prep.upkeep.checks import add_info, add_overlap, add_verify, run_info, run_overlap, run_verify
from data_prep.upkeep.doctor import add_doctor, run_doctor
from data_prep.upkeep.report import add_report, run_report
from data_prep.upkeep.similar import SIMILAR_VERBS
from data_prep.upkeep.upload import add_upload, run_upload
from data_prep.verbs.annotation import ANNOTATION_VERBS
from data_prep.verbs.caption_sets import CAPTION_VERBS
from data_prep.verbs.corpora import CORPUS_VERBS
from data_prep.verbs.drawn import add_synth, run_synth
from data_prep.verbs.flickr8k import add_flickr8k, run_flickr8k
from data_prep.verbs.parquet import add_parquet, run_parquet
from data_prep.verbs.tokenizer import add_tokenizer, run_tokenizer
from data_prep.verbs.urls import add_urls, run_urls
from data_prep.verbs.video import VIDEO_VERBS
from data_prep.verbs.webdataset import add_webdataset, run_webdataset

_VERBS: dict[str, Verb] = {
    "synth": ("make the synthetic corpora (no network, no files needed)", add_synth, run_synth),
    "urls": ("download a table of URLs and captions through img2dataset", add_urls, run_urls),
    "parquet": ("prepare parquet files that hold the images themselves", add_parquet, run_parquet),
    "webdataset": ("take in shards that another program wrote", add_webdataset, run_webdataset),
    "flickr8k": ("prepare Flickr8k from its images, captions and split lists", add_flickr8k, run_flickr8k),
    **CORPUS_VERBS,
    **CAPTION_VERBS,
    **ANNOTATION_VERBS,
    **VIDEO_VERBS,
    "tokenizer": ("train a byte-level BPE from prepared captions", add_tokenizer, run_tokenizer),
    "verify": ("reopen, re-hash, recount and decode everything", add_verify, run_verify),
    "info": ("describe prepared data: counts, sizes, captions, rejected records", add_info, run_info),
    "report": ("draw a page of prepared data: rows at each stage, histograms, samples", add_report, run_report),
    "doctor": ("find what is damaged or left behind, repair it with --repair", add_doctor, run_doctor),
    "upload": ("bring prepared data to an object store", add_upload, run_upload),
    "overlap": ("name images of training splits that stand in held-out splits", add_overlap, run_overlap),
    **SIMILAR_VERBS,
}
VERBS = with_store_outputs(with_origins(_VERBS))
