"""Sizes and choices of a model, typed; the defaults are the paper's model (ViT-B/32 at 288 px, RoBERTa-base)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

AUTO = "auto"  # of model.vision.pretrained and model.text.pretrained


def option(default: Any, before: Any) -> Any:
    """A field of an option that came later: runs begun without it did what the value ``before`` means."""
    return field(default=default, metadata={"before": before})


@dataclass
class VisionConfig:
    """Vision tower: a CLIP-style ViT, or a model of another library.

    Args:
        name: open_clip ViT whose sizes are used (for example ViT-B-32-quickgelu); null uses the sizes below;
            open_clip/NAME, timm/NAME or hf/NAME_OR_FOLDER takes any image model of that library, its feature map or
            tokens (for example timm/tf_efficientnet_lite0).
        pretrained: local weights file (safetensors or PyTorch), a tag of the library's (openai; timm: in1k; hf: a name
            or folder with model.safetensors), or null for random initialisation. auto takes openai's, or the library's
            default, where the local cache or the hub has them and they fit, else random ones, with a warning.
        frozen: keep the tower as it is loaded: no gradient, no place in checkpoints, which refer to its source by hash,
            so pretrained (or model.weights) must name one.
        image_size: input resolution in pixels; position tables are resized bicubically to it.
        patch_size: pixels per patch side (when name is null).
        width: hidden width (when name is null).
        layers: transformer blocks before dropping the last (when name is null).
        head_width: width of one attention head (when name is null).
        mlp_ratio: MLP width over hidden width (when name is null).
        quick_gelu: x*sigmoid(1.702x) instead of GELU (when name is null).
        drop_last_block: leave out the last block, as FLM does (not of LIBRARY/NAME).
        stage: tokens are those that this part of a timm model gives, from 0 (blocks of a ViT, feature maps of the
            others), and what stands behind it is left out; null is the last one's, behind the model's last norm.
        layout: clip has a norm before the blocks and one behind them; eva has neither, and a bias in its patches (when
            name is null; name eva-vit-g is EVA-CLIP's ViT-g/14, as EVLGen and BLIP-2 use it).
        temporal: how the frames of a video tell each other what they show, in every block: released as EVLGen's
            release, blind to their order; ordered, which is not; null not at all (not of LIBRARY/NAME). It is trained
            where the tower is frozen too.
        standardise: put a norm behind the tower that begins with channels of mean 0 and variance 1 over the first
            training images: with features of a trained tower, flm, mlm, ar and prefixlm learn faster (not of released
            behaviour; evlgen has model.connector.standardise).
    """

    name: str | None = "ViT-B-32-quickgelu"
    pretrained: str | None = None
    frozen: bool = False
    image_size: int = 288
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    drop_last_block: bool = True
    stage: int | None = None
    layout: Literal["clip", "eva"] = "clip"
    temporal: Literal["released", "ordered"] | None = None
    standardise: bool = False


@dataclass
class TextConfig:
    """Text tower: RoBERTa-style bottom half, cross-modal top half.

    Args:
        pretrained: Hugging Face name or folder of a RoBERTa or BERT model for the bottom half; null for random
            initialisation. auto takes roberta-base where the local cache or the hub has it and it fits, the tokens
            included, else random weights, with a warning.
        width: hidden width, a multiple of heads.
        heads: attention heads.
        ffn_width: feed-forward width.
        bottom_layers: uni-modal layers.
        top_layers: layers that also cross-attend to the image.
        max_positions: rows of the position table, RoBERTa counts from 2, so texts may have max_positions - 2 tokens.
        dropout: dropout probability on attention and hidden states.
    """

    pretrained: str | None = None
    width: int = 768
    heads: int = 12
    ffn_width: int = 3072
    bottom_layers: int = 6
    top_layers: int = 6
    max_positions: int = 514
    dropout: float = 0.1


@dataclass
class ReconstructorConfig:
    """Reconstructor depth: the last so many bottom and top text layers get a reconstructor layer.

    Args:
        bottom_layers: at most text.bottom_layers; null means all.
        top_layers: at most text.top_layers; null means all.
        boundary_states: the states beside what is hidden from a query, the last one that it reads of the l2r stream and
            the first one of the r2l stream, are added to it in front of its first layer of each half and behind its
            last. Not of released behaviour.
    """

    bottom_layers: int | None = None
    top_layers: int | None = None
    boundary_states: bool = False


@dataclass
class ConnectorConfig:
    """What turns the tokens of a frozen vision tower into tokens that a frozen language model reads (EVLGen).

    Args:
        name: tomeformer merges tokens in a BERT encoder, tome before two linear layers; qformer and perceiver read them
            by learned queries, in BERT layers and in pre-LN layers; pooling takes means over the grid, pixel_shuffle
            stacks neighbours of it, both before two linear layers.
        pretrained: Hugging Face name or folder of a BERT whose layers tomeformer and qformer begin with; null begins
            with random ones.
        num_tokens: tokens that the language model reads of an image.
        merges_per_layer: tokens that each layer of tomeformer, or round of tome, merges, instead of num_tokens (the
            release: 19); a number, or one for each.
        merges_slope: with one number in merges_per_layer it is the mean: -1 merges twice as many in the first layer and
            none in the last, 1 the other way round, in even steps between.
        merging: weighted counts a merged token as many times as there are tokens in it, plain once, as the release.
        fewest_tokens: train with any number of tokens from this one to num_tokens, drawn for each micro-batch, so that
            one model serves all of them; null trains with num_tokens. Of tomeformer and tome.
        width: hidden width, a multiple of heads; of pooling, pixel_shuffle and tome that between their linear layers.
        heads: attention heads.
        ffn_width: feed-forward width.
        layers: layers of tomeformer, qformer or perceiver; rounds of tome.
        max_positions: rows of tomeformer's position table, so many tokens of an image at most.
        dropout: dropout probability on attention and hidden states of tomeformer, qformer and perceiver.
        standardise: begin with channels that differ as much from image to image, and are 0 on average, as the first
            training images have them; false begins as if all channels were alike. Not of released behaviour.
    """

    name: Literal["tomeformer", "tome", "qformer", "perceiver", "pooling", "pixel_shuffle"] = "tomeformer"
    pretrained: str | None = None
    num_tokens: int = 29
    merges_per_layer: int | list[int] | None = None
    merges_slope: float = 0.0
    merging: Literal["weighted", "plain"] = "weighted"
    fewest_tokens: int | None = None
    width: int = 768
    heads: int = 12
    ffn_width: int = 3072
    layers: int = 12
    max_positions: int = 512
    dropout: float = 0.1
    standardise: bool = True


@dataclass
class LanguageConfig:
    """The language model that reads an image's tokens before a text (evlgen); it is not trained itself.

    Args:
        name: folder, or Hugging Face name, of a causal LM with its weights (safetensors) and tokenizer: OPT, Llama,
            Qwen, SmolLM2 and the like.
        own_dropout: leave the model's own dropout on in training, as the release does with OPT; of released behaviour.
        lora_rank: rank of what is trained beside its linear layers (LoRA); 0 trains nothing there.
        lora_alpha: what is added counts lora_alpha / lora_rank times.
        lora_dropout: dropout probability on what an adapter reads.
        lora_modules: linear layers that get an adapter, by name or the end of it; each must be there.
    """

    name: str | None = None
    own_dropout: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class ModelConfig:
    """The model.

    Args:
        behaviour: default mends the defects of the public release, released reproduces its numbers.
        weights: what all weights start from: a run folder, one of its checkpoint folders, or a folder made by
            `python -m pipeline.convert import-flm`; heads may differ. null starts from vision.pretrained and
            text.pretrained, or from random ones.
        activation_checkpointing: keep only the inputs of each layer for backward and compute the rest anew: less memory
            (for 576 px or large micro-batches), about a third more time, the same numbers.
        vision: vision tower.
        text: text tower.
        reconstructor: reconstructor depth.
        connector: from the vision tower to the language model (evlgen).
        language: the language model (evlgen).
    """

    behaviour: Literal["default", "released"] = "default"
    weights: str | None = None
    activation_checkpointing: bool = False
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    reconstructor: ReconstructorConfig = field(default_factory=ReconstructorConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)


@dataclass
class ObjectiveOptions:
    """What is trained: flm, or one of the baselines mlm, ar, prefixlm on the same towers; evlgen; or qformer_stage1,
    which evlgen with a Q-Former may start from.

    Args:
        name: objective; it decides which of the options below there are.
    """

    name: Literal["flm", "mlm", "ar", "prefixlm", "evlgen", "qformer_stage1"] = "flm"

    def check(self) -> None:
        """Raises ValueError for a number out of its range."""

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"objective.{name} is {getattr(self, name)}, expected {expected}")


@dataclass
class EVLGenOptions(ObjectiveOptions):
    """Options of evlgen: none of its own."""

    name: Literal["evlgen"] = "evlgen"


@dataclass
class QFormerStage1Options(ObjectiveOptions):
    """Options of qformer_stage1, whose loss is itc_weight*itc + itm_weight*itm + itg_weight*itg.

    Args:
        itc_weight: weight of the image-text contrastive loss.
        itm_weight: weight of image-text matching, against the hardest wrong pairs of the micro-batch.
        itg_weight: weight of image-grounded text generation.
        embedding_width: width of the space in which images and texts are compared.
    """

    name: Literal["qformer_stage1"] = "qformer_stage1"
    itc_weight: float = 1.0
    itm_weight: float = 1.0
    itg_weight: float = 1.0
    embedding_width: int = 256

    def check(self) -> None:
        for name in ("itc_weight", "itm_weight", "itg_weight"):
            self._expect(name, 0 < getattr(self, name) < float("inf"), "a number above 0")
        self._expect("embedding_width", self.embedding_width >= 1, "1 or more")


@dataclass
class PairOptions(ObjectiveOptions):
    """What flm, mlm, ar and prefixlm have in common. Total = language loss + itm_weight*itm + itc_weight*itc.

    Args:
        itm_weight: weight of image-text matching, which trains the CLS feature; ignored by released behaviour.
        negative_share: share of samples that get one negative caption for image-text matching.
        negatives: corpus draws that caption from the whole corpus, so no number depends on who shares a micro-batch;
            in_batch_hard takes the one of the same micro-batch that resembles the sample's own most, so results depend
            on optim.micro_batch_size (not on the number of ranks while that stays).
        itc_weight: weight of the contrast of texts and images of a micro-batch, each read by itself: means of the
            words' states behind the bottom half and of the image's tokens; 0 leaves it out. Results then depend on
            optim.micro_batch_size. Not of released behaviour.
        itc_width: width of the space in which they are compared.
    """

    itm_weight: float = 0.1
    negative_share: float = 0.0625
    negatives: Literal["corpus", "in_batch_hard"] = "corpus"
    itc_weight: float = 0.0
    itc_width: int = 256

    def check(self) -> None:
        for name in ("itm_weight", "itc_weight"):
            self._expect(name, 0 <= getattr(self, name) < float("inf"), "a number, 0 or more")
        self._expect("itc_width", self.itc_width >= 1, "1 or more")
        self._expect("negative_share", 0 <= self.negative_share <= 1, "0 to 1")


@dataclass
class FLMOptions(PairOptions):
    """Options of flm, whose language loss is (flm + l2r_weight*l2r + r2l_weight*r2l)/(1 + both weights).

    Args:
        corruption_rate: share of a caption's words hidden from each target, itself included; 0 hides it only.
        span_placement: uniform places the hidden span anywhere around its target, centred around it.
        query_rate: share of a caption's words that are reconstructed, at least one, drawn anew each time.
        stream_rate: the same of the words that each stream predicts; all their states are computed whatever it is.
        reconstruction_share: share of the captions whose words are reconstructed; of the others only the forward
            stream is computed, which costs less than half, and learns.
        l2r_weight: weight of the forward language-model loss.
        r2l_weight: weight of the reverse language-model loss.
    """

    name: Literal["flm"] = "flm"
    corruption_rate: float = 0.0
    span_placement: Literal["uniform", "centred"] = "uniform"
    query_rate: float = 1.0
    stream_rate: float = 1.0
    reconstruction_share: float = 1.0
    l2r_weight: float = 1.0
    r2l_weight: float = 1.0

    def check(self) -> None:
        super().check()
        self._expect("corruption_rate", 0 <= self.corruption_rate <= 1, "0 to 1")
        for name in ("query_rate", "stream_rate", "reconstruction_share"):
            self._expect(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        for name in ("l2r_weight", "r2l_weight"):
            self._expect(name, 0 <= getattr(self, name) < float("inf"), "a number, 0 or more")
        learns = self.l2r_weight > 0 or self.reconstruction_share == 1
        self._expect("l2r_weight", learns, "above 0 with objective.reconstruction_share below 1")


@dataclass
class MLMOptions(PairOptions):
    """Options of mlm.

    Args:
        mask_rate: share of a caption's words that are hidden, at least one of them.
        prediction_rate: share of a caption's words that are predicted; null predicts those that are hidden.
        whole_words: hide all tokens of a word or none.
    """

    name: Literal["mlm"] = "mlm"
    mask_rate: float = 0.4
    prediction_rate: float | None = None
    whole_words: bool = False

    def check(self) -> None:
        super().check()
        for name in ("mask_rate", "prediction_rate"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 < value <= 1, "above 0 and at most 1")


@dataclass
class AROptions(PairOptions):
    """Options of ar: none of its own."""

    name: Literal["ar"] = "ar"


@dataclass
class PrefixLMOptions(PairOptions):
    """Options of prefixlm.

    Args:
        prefix_share: share of a caption's words in the prefix; null draws it anew for every caption.
    """

    name: Literal["prefixlm"] = "prefixlm"
    prefix_share: float | None = None

    def check(self) -> None:
        super().check()
        in_range = self.prefix_share is None or 0 <= self.prefix_share < 1
        self._expect("prefix_share", in_range, "0 to below 1: at least one word is predicted")


OPTIONS_OF: dict[str, type[ObjectiveOptions]] = {
    "flm": FLMOptions,
    "mlm": MLMOptions,
    "ar": AROptions,
    "prefixlm": PrefixLMOptions,
    "evlgen": EVLGenOptions,
    "qformer_stage1": QFormerStage1Options,
}


def objective_options(name: str = "flm", **options: Any) -> ObjectiveOptions:
    """The options of the objective ``name``; raises TypeError for one that it does not have."""
    return OPTIONS_OF[name](**options)


@dataclass(frozen=True)
class Vocabulary:
    """What the model must know of the tokenizer: size, the ids of the special tokens, which tokens begin a word.

    ``word_starts`` is one byte per token, 1 where a word begins; empty where that is not known. A tokenizer of a
    language model may lack some of these (-1), and name one token twice.
    """

    size: int
    bos_id: int  # <s>
    pad_id: int
    eos_id: int  # </s>
    mask_id: int
    word_starts: bytes = field(default=b"", repr=False)
    newline_id: int = -1  # of a line break, where it is one token

    @property
    def special_ids(self) -> tuple[int, ...]:
        return self.bos_id, self.pad_id, self.eos_id, self.mask_id

    def starts_word(self, token: int) -> bool:
        return self.word_starts[token] == 1
