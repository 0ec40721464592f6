"""Where the published files of each corpus are found, and whose terms they come under."""

from __future__ import annotations

from typing import NamedTuple


class Origin(NamedTuple):
    """``page`` on which a person downloads ``files`` and accepts ``terms``; nothing of it is downloaded by data_prep,
    save images by the addresses in the files where a verb says so."""

    page: str
    files: str
    terms: str

    def sentence(self) -> str:
        """One sentence for a help text or an error message."""
        return f"download {self.files} from {self.page} yourself; {self.terms}"


_OF_FLICKR = "the photographs belong to people on Flickr, whose licences hold"
_KARPATHY = "cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip)"
ORIGINS: dict[str, Origin] = {
    "cc3m": Origin(
        "ai.google.com/research/ConceptualCaptions/download",
        "Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv",
        "free use with attribution of the table, the images belong to their sites",
    ),
    "cc12m": Origin(
        "github.com/google-research-datasets/conceptual-12m",
        "cc12m.tsv",
        "free use with attribution of the table, the images belong to their sites",
    ),
    "sbu": Origin("www.cs.rice.edu/~vo9/sbucaptions", "sbu-captions-all.tar.gz or the two lists", _OF_FLICKR),
    "laion": Origin(
        "laion.ai and its pages on huggingface.co/laion (some want a login)",
        "the folder of parquet files",
        "CC BY 4.0 of the table, the images belong to their sites",
    ),
    "coco": Origin(
        f"cocodataset.org/#download and {_KARPATHY}",
        "annotations_trainval2014.zip, train2014.zip and val2014.zip, or dataset_coco.json",
        f"CC BY 4.0 of the annotations, {_OF_FLICKR}",
    ),
    "vg": Origin(
        "homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        "region_descriptions.json, image_data.json, images.zip and images2.zip",
        f"CC BY 4.0 of the annotations, {_OF_FLICKR}",
    ),
    "flickr30k": Origin(
        f"shannon.cs.illinois.edu/DenotationGraph (by a form) and {_KARPATHY}",
        "flickr30k-images.tar.gz and dataset_flickr30k.json",
        f"for non-commercial research, {_OF_FLICKR}",
    ),
    "flickr8k": Origin(
        "hockenmaier.cs.illinois.edu/8k-pictures.html (by a form) or kaggle.com/datasets/adityajn105/flickr8k",
        "Flickr8k_Dataset.zip and Flickr8k_text.zip, or Kaggle's archive",
        f"for non-commercial research, {_OF_FLICKR}",
    ),
    "vqav2": Origin(
        "visualqa.org/download.html and cocodataset.org/#download",
        "questions, annotations and COCO's images",
        f"CC BY 4.0 of the annotations, {_OF_FLICKR}",
    ),
    "nlvr2": Origin(
        "github.com/lil-lab/nlvr (images by its form)",
        "train.json, dev.json and test1.json",
        "CC BY 4.0 of the annotations, the images belong to their sites",
    ),
    "snli_ve": Origin(
        "github.com/necla-ml/SNLI-VE and shannon.cs.illinois.edu/DenotationGraph (by a form)",
        "snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl and Flickr30k's images",
        f"see its pages, {_OF_FLICKR}",
    ),
    "gqa": Origin(
        "cs.stanford.edu/people/dorarad/gqa/download.html",
        "questions1.2.zip and images.zip",
        f"CC BY 4.0 of the questions, {_OF_FLICKR}",
    ),
    "okvqa": Origin(
        "okvqa.allenai.org/download.html and cocodataset.org/#download",
        "questions, annotations and COCO's images",
        f"see its page, {_OF_FLICKR}",
    ),
    "nocaps": Origin(
        "nocaps.org/download",
        "nocaps_val_4500_captions.json, and the images it names of Open Images",
        f"see its page, {_OF_FLICKR}",
    ),
}
