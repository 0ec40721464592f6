"""What options of ours are called elsewhere, for the hint of the line that refuses an unknown one."""

from __future__ import annotations

# Last part of a name -> the option of ours, or what to do instead.
OPTIONS: dict[str, str] = {
    **dict.fromkeys(
        ("lr_mult_tower", "lr_mult_backbone", "lr_mult_visual", "vision_lr", "lr_vision"), "optim.lr_mult_vision"
    ),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "total_steps"), "train.steps"),
    **dict.fromkeys(("num_epochs", "max_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "clip_grad", "gradient_clipping"), "optim.clip_grad_norm"),
    **dict.fromkeys(("amp", "bf16", "fp16", "dtype", "mixed_precision"), "train.precision"),
    **dict.fromkeys(
        ("gradient_checkpointing", "grad_checkpointing", "checkpointing"), "model.activation_checkpointing"
    ),
    **dict.fromkeys(("freeze", "freeze_vision", "lock_image"), "model.vision.frozen"),
    **dict.fromkeys(("image_resolution", "resolution", "img_size", "input_size"), "model.vision.image_size"),
    **dict.fromkeys(("resume", "resume_from", "output_dir", "run", "save_dir"), "output"),
    **dict.fromkeys(("config", "cfg", "preset"), "recipe"),
    **dict.fromkeys(("dryrun", "dry_run"), "dry-run"),
    **dict.fromkeys(("pretrained_weights", "init_from", "checkpoint"), "model.weights"),
    "warmup_ratio": "optim.warmup_fraction",
    "seed": "train.seed",
    "workers": "data.num_workers",
}
WAYS: dict[str, str] = {
    **dict.fromkeys(
        ("flm_weight", "flm_loss_weight", "lm_weight", "weight"),
        "the objective's own loss has weight 1; weigh the others against it, like --objective.itm_weight",
    ),
    **dict.fromkeys(
        ("warmup_steps", "warmup"), "give the share of the steps, --optim.warmup_fraction, instead of their number"
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulation", "grad_accum", "accum_freq"),
        "it follows from --optim.batch_size (of all ranks) and --optim.micro_batch_size (of a pass)",
    ),
    **dict.fromkeys(
        ("num_gpus", "gpus", "nproc_per_node", "num_processes"),
        "the launcher starts the ranks: deepspeed --num_gpus N pipeline/train.py",
    ),
}
WAYS_OF: dict[str, tuple[str, ...]] = {  # the sections that such a name is looked for in
    name: ("objective",) if name == "weight" else ("", "objective", "optim", "train", "data") for name in WAYS
}
