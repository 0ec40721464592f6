"""How many images and texts the published sets have, for comparing with what was read."""

from __future__ import annotations

# Counts of the files as their authors publish them: visualqa.org/download.html, lil-lab/nlvr, Karpathy's splits
# (github.com/karpathy/neuraltalk2), necla-ml/SNLI-VE, vzhou842/easy-VQA, nocaps.org/download, okvqa.allenai.org;
# MSR-VTT (Xu et al., CVPR 2016), MSVD in the splits of Venugopalan et al. (2015). GQA's are those of the balanced
# questions as a public copy of the set counts them (lmms-lab/GQA on the Hugging Face hub).
PUBLISHED: dict[str, dict[str, dict[str, int]]] = {
    "vqav2": {
        "train": {"questions": 443_757, "images": 82_783, "answers": 4_437_570},
        "dev": {"questions": 214_354, "images": 40_504, "answers": 2_143_540},
        "test": {"questions": 447_793, "images": 81_434},
        "test_dev": {"questions": 107_394},
    },
    "gqa": {
        "train": {"questions": 943_000},
        "dev": {"questions": 132_062},
        "test_dev": {"questions": 12_578, "images": 398},
        "test": {"questions": 95_336, "images": 2_987},
    },
    "okvqa": {
        "train": {"questions": 9_009, "answers": 90_090},
        "test": {"questions": 5_046, "answers": 50_460},
    },
    "nocaps": {
        "dev": {
            **{"images": 4_500, "captions": 45_000},
            **{"in-domain": 648, "near-domain": 2_938, "out-domain": 914},
        },
    },
    "nlvr2": {
        "train": {"statements": 86_373},
        "dev": {"statements": 6_982, "balanced": 2_300, "unbalanced": 3_562},
        "test": {"statements": 6_967, "balanced": 2_316, "unbalanced": 3_536},
        "test2": {"statements": 6_970},
    },
    "coco": {
        "train": {"images": 113_287, "captions": 566_747},
        "train, without restval": {"images": 82_783, "captions": 414_113},
        "dev": {"images": 5_000, "captions": 25_010},
        "test": {"images": 5_000, "captions": 25_010},
    },
    # COCO's own files (cocodataset.org); val2014 and val2017 are dev here
    "coco captions": {
        "train2014": {"images": 82_783, "captions": 414_113},
        "val2014": {"images": 40_504, "captions": 202_654},
        "train2017": {"images": 118_287, "captions": 591_753},
        "val2017": {"images": 5_000, "captions": 25_014},
    },
    "vg": {"train": {"images": 108_077}},  # homes.cs.washington.edu/~ranjay/visualgenome
    # Rows of the tables, from their pages: ai.google.com/research/ConceptualCaptions (the copies of the validation
    # file in circulation have 15,833 lines), github.com/google-research-datasets/conceptual-12m, cs.rice.edu/~vo9
    "cc3m": {
        "train": {"rows": 3_318_333},
        "train, with image labels": {"rows": 2_007_090},
        "dev": {"rows": 15_840},
    },
    "cc12m": {"train": {"rows": 12_423_374}},
    "sbu": {"train": {"rows": 1_000_000}},
    "flickr30k": {
        "train": {"images": 29_000, "captions": 145_000},
        "dev": {"images": 1_014, "captions": 5_070},
        "test": {"images": 1_000, "captions": 5_000},
    },
    "snli_ve": {
        "train": {
            **{"hypotheses": 529_527, "images": 29_783},
            **{"entailment": 176_932, "neutral": 176_045, "contradiction": 176_550},
        },
        "dev": {"hypotheses": 17_858, "images": 1_000, "entailment": 5_959, "neutral": 5_960, "contradiction": 5_939},
        "test": {"hypotheses": 17_901, "images": 1_000, "entailment": 5_973, "neutral": 5_964, "contradiction": 5_964},
    },
    "msrvtt": {
        "train": {"videos": 6_513, "captions": 130_260},
        "train, with validation": {"videos": 7_010, "captions": 140_200},
        "dev": {"videos": 497, "captions": 9_940},
        "test": {"videos": 2_990, "captions": 59_800},
    },
    "msvd": {"train": {"videos": 1_200}, "dev": {"videos": 100}, "test": {"videos": 670}},
    "easy_vqa": {
        "train and dev": {"questions": 38_575, "images": 4_000},
        "test": {"questions": 9_673, "images": 1_000},
    },
}


def compare(corpus: str, split: str, counts: dict[str, int]) -> str:
    """The counts of a split in one line, each with "as published" or with the published number."""
    published = PUBLISHED.get(corpus, {}).get(split, {})
    return ", ".join(f"{count:,} {what}{_remark(count, published.get(what))}" for what, count in counts.items())


def as_published(corpus: str, split: str, counts: dict[str, int]) -> bool:
    """Whether all counts that were published of a split are these."""
    published = PUBLISHED.get(corpus, {}).get(split, {})
    return bool(published) and all(counts.get(what) == count for what, count in published.items())


def _remark(count: int, published: int | None) -> str:
    if published is None:
        return ""
    if count == published:
        return " (as published)"
    return f" (published: {published:,}, {abs(count - published):,} {'fewer' if count < published else 'more'})"
