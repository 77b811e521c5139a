"""The settings of a training run: options of `meddam finetune`, keys of its YAML file, and fields of run.json alike."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """What `meddam finetune` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of image shards (or single .parquet files) to learn from, on S3 or disk; one named twice comes twice as
    often."""
    out: str
    """Where checkpoints, curve and model go, on S3 or disk. Run again with the same to resume."""
    model: str
    """DAM checkpoint folder to start from, or `tiny`: a small one from scratch, with a tokenizer of its own."""
    captions: tuple[str, ...] = ()
    """Runs of `meddam caption` or sets of `meddam curate`; without any, phantoms get captions made from their truth."""
    split: str | None = None
    """Learn from images of this split only."""
    learn: Literal["captions", "labels"] = "captions"
    """labels: a first stage for a model from scratch, which learns to see by naming regions' labels (no captions)."""
    labels: tuple[str, ...] = ()
    """The labels that are learnt then; by default all with 2 to 32 values."""
    train: Literal["full", "lora", "language", "projector"] = "full"
    """What is trained: all; LoRA on the language model, with adapters and projector; the language model and the
    projector; adapters and projector only."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the LoRA matrices."""
    prompts: tuple[str, ...] = ("meddam-v1",)
    """Prompts to train with; one named twice comes twice as often. Captions of a table keep the prompt of their run."""
    max_steps: int = Field(1000, ge=1)
    """Optimizer steps in all."""
    batch_size: int = Field(32, ge=1)
    """Regions in one forward pass of one worker."""
    accumulate: int = Field(1, ge=1)
    """Forward passes of each worker in a step."""
    learning_rate: float = Field(2e-5, gt=0)
    """Of the warm-up's end; half a cosine takes it down from there."""
    warmup_steps: int = Field(50, ge=1)
    """Steps over which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; norms, biases, embeddings and gates are not decayed."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this length."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic; weights and optimizer stay float32."""
    checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, about a third more time."""
    augment: float = Field(1.0, ge=0, le=2)
    """Strength of changes of light, noise, small turns and shifts; never flips. 0 is none."""
    swap: float = Field(0.0, ge=0, le=1)
    """Phantoms only: share of regions shown with another region's full view, and the facts that this shows."""
    view: Literal["both", "focal", "full", "no-mask"] = "both"
    """What the model sees, for ablations: both views, one of them twice, or both without the mask."""
    window: int = Field(8, ge=1)
    """Row groups (or files of views) that are mixed with each other."""
    cache_views: bool = False
    """Prepare views once, under OUT/views, where rendering would take longer than learning."""
    gate_rate: float = Field(5.0, ge=0)
    """How many times as fast as the rest the adapters' gates learn. From scratch with open gates take 1: quick gates
    close again while the full view says nothing yet."""
    open_gates: float = 0.0
    """What the gates of a model from scratch start at; those of a checkpoint stay as they are."""
    seed: int = 0
    """Of first weights, order, wording and augmentation."""
    num_workers: int = Field(1, ge=0)
    """Ray Train workers; 0 trains in this process, without Ray: the plain loop."""
    use_gpu: bool | None = None
    """One GPU a worker; by default where the cluster has one for each."""
    strategy: Literal["ddp", "zero1", "fsdp", "deepspeed"] = "ddp"
    """What several workers keep: all of it each; the optimizer in shares (ZeRO 1); all in shares; DeepSpeed's ZeRO."""
    zero_stage: Literal[2, 3] = 2
    """Of DeepSpeed: gradients and optimizer in shares, or weights too."""
    max_failures: int = Field(3, ge=0)
    """Lost workers after which the job gives up."""
    log_every: int = Field(20, ge=1)
    """Steps that one entry of the curve is the mean of."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older ones are deleted."""
    eval_shards: tuple[str, ...] = ()
    """Held-out image shards: MedDLC-score (lexical judge, strict) is measured on them during training."""
    eval_every: int = Field(500, ge=1)
    """Steps between these measurements."""
    eval_regions: int = Field(100, ge=1)
    """Regions that are measured on."""
    num_threads: int | None = Field(None, ge=1)
    """Threads of torch in each worker, on a CPU."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""

    @model_validator(mode="after")
    def _stage_fits(self) -> Config:
        if self.learn == "labels" and (self.train != "full" or self.captions or self.eval_shards):
            raise ValueError("--learn labels trains all of the vision side and reads no captions: leave out --train, "
                             "--caption and --eval-shard")  # fmt: skip
        if self.labels and self.learn != "labels":
            raise ValueError("--label names what --learn labels learns; add it, or leave --label out")
        return self
