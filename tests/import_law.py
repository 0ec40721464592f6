"""The import law of docs/architecture.md as tables: who may import whom, and what is confined to which file."""

from __future__ import annotations

# Wing -> the wings of its package that its files may import. A wing is a folder, or a list of files beside the folders
# (FILES_OF). "wing.file" allows that one file. Within a wing any file may import any other, in no circle.
LAW: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        "cpu": (),
        "core": ("cpu.door",),
        "vision": ("core",),
        "merge": (),
        "connectors": ("core", "merge", "vision.tower", "vision.channel_norm"),
        "plans": ("core", "language.text_form"),
        "language": ("core", "cpu.door"),
        "networks": ("core", "vision", "merge", "connectors", "language"),
        "objectives": ("core", "plans", "networks", "decode"),
        "decode": ("core", "plans", "networks"),
        "scoring": ("core", "networks"),
        "weights": ("core", "vision", "objectives"),
        "programs": (
            *("core", "vision", "language", "plans", "networks", "objectives", "decode", "scoring", "weights"),
        ),
    },
    "data_prep": {
        "stores": (),
        "border": ("stores",),
        "processes": (),
        "images": (),
        "video": ("images",),
        "splits": ("border", "processes", "images", "video"),
        "uploads": ("stores", "border", "splits"),
        "annotations": ("border", "splits"),
        "video_sets": ("border", "splits", "annotations"),
        "sources": ("border", "splits", "annotations"),
        "own_pictures": ("border", "splits", "annotations", "sources"),
        "downloading": ("border", "splits"),
        "parts": ("border", "processes", "splits", "downloading"),
        "drawn": ("border", "processes", "splits", "video"),
        "foreign": ("border", "processes", "splits"),
        "checks": ("border", "processes", "images", "splits", "video"),
        "similar": ("border", "processes", "images", "splits", "checks"),
        "repairing": ("border", "splits", "checks"),
        "reporting": ("border", "processes", "images", "video", "splits", "checks"),
        "tokenizer": ("border", "splits", "checks"),
        "options": (
            *("border", "processes", "splits", "video", "annotations", "sources", "downloading", "parts", "stores"),
            "uploads",
        ),
        "upkeep": (
            *("border", "processes", "splits", "stores", "uploads", "checks", "similar", "repairing", "reporting"),
            "options",
        ),
        "verbs": (
            *("border", "processes", "video", "splits", "annotations", "video_sets", "sources", "drawn", "foreign"),
            *("tokenizer", "stores", "options", "upkeep", "own_pictures"),
        ),
        "programs": ("border", "splits", "video", "stores.failures", "verbs.table"),
    },
    "pipeline": {
        "exported": (),
        "config": ("exported",),
        "deepspeed_json": ("config",),
        "metrics": (),
        "planning": ("config",),
        "distributed": ("config",),
        "host": ("distributed",),
        "data": ("config",),
        "checkpoint": ("config", "distributed", "exported"),
        "cluster": ("config", "distributed", "checkpoint.folders", "recording.run_log"),
        "staging": ("config", "distributed", "data"),
        "incidents": ("config", "checkpoint"),
        "engine": ("config", "deepspeed_json", "distributed", "checkpoint", "incidents"),
        "recording": (),
        "reporting": (
            *("config", "incidents", "recording", "cluster.restarts", "cluster.last_words", "distributed.endings"),
        ),
        "comparing": ("config", "recording", "reporting", "checkpoint.folders"),
        "language_weights": (),
        "weights": ("config", "distributed", "data", "checkpoint", "language_weights", "exported"),
        "stored_features": ("config", "distributed", "data", "checkpoint.files", "weights.sources"),
        "pictures": ("config", "data"),
        "loading": ("config", "distributed", "data", "recording", "stored_features", "pictures"),
        "tasks": ("config", "metrics", "distributed", "data", "checkpoint", "weights", "loading", "pictures"),
        "finetuning": ("config", "metrics", "distributed", "data", "checkpoint", "weights", "loading", "tasks"),
        "scoring": (
            *("config", "metrics", "distributed", "data", "checkpoint", "weights", "loading", "recording", "tasks"),
            *("finetuning", "stored_features", "pictures", "exported"),
        ),
        "exporting": (
            *("config", "data", "checkpoint", "exported", "weights", "loading", "pictures", "tasks", "finetuning"),
        ),
        "batching": (),
        "serving": ("config", "batching", "using.model"),
        "using": (*("config", "data", "checkpoint", "weights", "loading", "pictures", "tasks", "finetuning"),),
        "training": (
            *("config", "distributed", "data", "checkpoint", "incidents", "engine", "recording", "weights", "loading"),
            *("cluster", "staging", "stored_features", "tasks.task", "tasks.evaluation", "reporting.page"),
            "deepspeed_json",
        ),
        "dry_run": (
            *("config", "planning", "distributed", "data", "checkpoint", "engine.peak_flops", "loading", "recording"),
            *("tasks", "finetuning", "training", "deepspeed_json"),
        ),
        "programs": (
            *("config", "distributed", "data", "checkpoint", "incidents", "engine", "recording", "weights", "loading"),
            *("reporting", "comparing", "stored_features", "tasks", "finetuning", "training", "metrics", "scoring"),
            *("cluster", "planning", "host", "pictures", "exporting", "using", "batching", "serving"),
            *("deepspeed_json", "dry_run"),
        ),
    },
    "openflm": {"door": ()},
}
FILES_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        "core": (
            *("batch", "config", "masks", "attention", "layers", "dropout", "cross_entropy", "heads"),
            *("torchvision_shim", "census", "frozen", "learning_rate_groups", "recomputing"),
        ),
        "networks": (
            *("towers", "flm", "one_stream", "evlgen", "qformer", "flops", "attention_maps", "merge_maps"),
            *("text_states", "language_attention"),
        ),
        "programs": ("build",),
    },
    "data_prep": {
        "border": (
            *("manifest", "npy", "listed_files", "sample_fields", "shard_members", "shard_table", "program"),
            "vqa_answers",
        ),
        "processes": ("parallel", "held_signals"),
        "images": ("images",),
        "splits": (
            *("caption_language", "corpus_card", "filters", "image_places", "passport", "prepare", "record"),
            *("shard_writer", "thumbnails"),
        ),
        "tokenizer": ("tokenizer",),
        "programs": ("__main__",),
    },
    "pipeline": {
        "programs": (
            *("train", "evaluate", "generate", "features", "replay", "report", "convert", "export", "census", "plan"),
            *("serve", "restart", "status", "health"),
        )
    },
    "openflm": {"door": ("commands",)},
}
LARGE_WINGS: dict[str, str] = {}  # wing of more than MAX_WING_LINES lines -> why
MAY_IMPORT = {
    "model": set(),
    "data_prep": set(),
    "pipeline": {
        "model",
        *(
            f"data_prep.{name}"
            for name in ("manifest", "npy", "shard_members", "images", "video", "program", "vqa_answers", "stores")
        ),
    },
    "openflm": {"pipeline.using"},
}
OURS = {"openflm", "model", "data_prep", "pipeline", "benchmarks", "scripts", "tests"}
FOREIGN_TO = {
    "model": {
        "deepspeed",
        "webdataset",
        "img2dataset",
        "mpi4py",
        "pyarrow",
        "pandas",
        "jsonargparse",
        "yaml",
        "jinja2",
    },
    "data_prep": {"torch", "torchvision", "deepspeed", "open_clip", "timm"},
    "pipeline": {"img2dataset"},
    "openflm": {"torch", "numpy", "PIL", "deepspeed"},
}
CONFINED = {  # module -> the only files of the three packages that touch it
    "torch.distributed": {
        "pipeline/distributed/rendezvous.py",
        "pipeline/distributed/ranks.py",
        "pipeline/distributed/bandwidth.py",
        "pipeline/engine/engine.py",
    },
    "deepspeed": {"pipeline/engine/ds_check.py", "pipeline/engine/engine.py", "pipeline/engine/full_state.py"},
    "torch.utils.tensorboard": {"pipeline/recording/trackers.py"},
    "tensorboard": {"pipeline/recording/trackers.py"},
    "wandb": {"pipeline/recording/trackers.py"},
    "py3langid": {"data_prep/caption_language.py"},
    "pyspark": {"data_prep/parts/engines.py"},
    "uvicorn": {"pipeline/serving/running.py", "pipeline/serving/connections.py"},
    "av": {"data_prep/video/decoding.py", "data_prep/video/encoding.py"},
}
NEEDS_SHIM = {"torchvision", "timm", "open_clip"}
