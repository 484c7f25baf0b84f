"""The training program's configuration: frozen dataclasses, read from YAML, checked in one place.

Nothing here imports JAX, so that the command line can show every field at once.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
Seconds = Annotated[float, Ge(0)]
FloatName = Literal["float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """A mistake in what the user gave: the message names the field, what it was, and what to do."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder-only transformer with rotary positions."""

    vocab_size: Positive = 384
    """Rows of the embedding. Text is bytes and one end-of-document token, 257 in all, padded to 384."""
    num_layers: Positive = 4
    """Decoder blocks, stacked by one scan."""
    d_model: Positive = 128
    """Width of the residual stream."""
    num_heads: Positive = 4
    """Query heads; d_model is divided among them."""
    num_kv_heads: Positive | None = None
    """Key and value heads, shared by groups of query heads; None: as many as query heads."""
    d_ff: Positive = 512
    """Width of the hidden layer of the MLP."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """The MLP: gated SwiGLU (three matrices) or GELU (two)."""
    max_len: Positive = 256
    """Tokens in every training and evaluation window."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Use the embedding for the output logits, too."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    dtype: FloatName = "float32"
    """Dtype of the computation."""
    param_dtype: FloatName = "float32"
    """Dtype of the parameters."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on. With neither `files` nor `tokens`: the running Python's standard library."""

    files: str | None = None
    """Glob of files to read as bytes, one document each, such as 'corpus/**/*.txt'."""
    tokens: str | None = None
    """Glob of headerless binary files of token ids, such as 'tokens/*.bin'."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Dtype of the ids in the `tokens` files."""
    eval_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Part of the files that is kept for evaluation, chosen by each file's hash."""
    eval_tokens: Positive = 131072
    """How many tokens of the evaluation text are scored, at most."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Sharded AdamW with a warmup and a cosine decay."""

    learning_rate: Annotated[float, Gt(0)] = 3e-3
    """Peak learning rate."""
    warmup_steps: Count = 20
    """Steps of linear warmup to the peak."""
    decay_steps: Positive = 200
    """Step at which the cosine ends. Not `steps`, so that going on with more steps keeps the same schedule."""
    end_fraction: Annotated[float, Ge(0)] = 0.1
    """Learning rate after `decay_steps`, as a part of the peak."""
    b1: Decay = 0.9
    """Decay of mu, the mean of the gradients."""
    b2: Decay = 0.95
    """Decay of nu, the mean of their squares."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """Added to the root of nu."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled weight decay of the matrices; norm scales have none."""
    mu_dtype: FloatName | None = None
    """Dtype of mu; None: the parameters' own."""
    layout: Literal["auto", "natural", "packed"] = "auto"
    """How mu and nu are split; see `shardadam.make_plan`."""
    min_size: Count = 1024
    """Leaves with fewer elements than this stay whole."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step reduces gradients and applies them; see `shardadam.make_train_step`."""

    stage: Literal[1, 2, 3] = 2
    """1: gradients whole on every device; 2: in shards; 3: the parameters too (best with 'model.remat')."""
    num_microbatches: Positive = 1
    """Into how many parts, one after the other, each device's part of the batch is cut."""
    accumulate: Literal["shards", "local"] = "shards"
    """Reduce each microbatch's gradient as it comes ('shards'), or once at the end ('local': more memory)."""
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    """Gradients are scaled down to this global norm; None: not clipped."""
    skip_nonfinite: bool = False
    """Skip a step whose gradients are not finite, instead of ending the run."""
    reduce_dtype: FloatName | None = None
    """Dtype gradients are reduced in; None: their own."""
    collective: Literal["auto", "joint", "per_axis"] = "auto"
    """One collective over all data axes, or one for each; 'auto': as the devices like it."""
    master_dtype: Literal["float32"] | None = None
    """Keep copies of narrower parameters in this dtype, in shards, and add the updates to those."""
    loss_scale: Annotated[float, Gt(0)] | Literal["dynamic"] | None = None
    """For float16: what the loss is multiplied with; 'dynamic' finds it, and skips the steps that overflow."""


@dataclass(frozen=True, kw_only=True)
class DeadlineConfig:
    """Seconds after which a process that is still at it ends itself as stuck, exit code 75; 0: it may take for ever."""

    start: Seconds = 600
    """Finding the other processes and the devices, reading the text, making the state."""
    compile: Seconds = 3600
    """Compiling, and the first step."""
    step: Seconds = 600
    """One step, or one batch of the evaluation."""
    save: Seconds = 3600
    """Saving a checkpoint, and waiting for the save before it."""
    restore: Seconds = 3600
    """Restoring a checkpoint."""
    heartbeat: Annotated[int, Ge(10), Le(30)] = 20
    """With several processes: one that is silent for so long ends the others."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    name: str = "run"
    """The run's name; its directory is `runs_dir`/`name`."""
    steps: Count = 200
    """Train until this step. A run that has got there goes on when this is raised."""
    batch_size: Positive = 32
    """Windows in a step, over all devices."""
    seed: Count = 0
    """Seed of the parameters and of the data order."""
    mesh: str = "data=-1"
    """Devices by axis, such as 'data=4,model=2': batch and Adam's state over data, tensors over model; -1: all left."""
    cpu_devices: Positive = 8
    """CPU devices to simulate for a mesh with -1 on a machine without accelerators."""
    platform: Literal["auto", "cpu"] = "auto"
    """'cpu' leaves accelerators alone."""
    runs_dir: str = "runs"
    """Where runs live."""
    log_every: Positive = 10
    """Steps between fetching metrics from the devices."""
    eval_every: Count = 0
    """Steps between evaluations; 0: only at the end."""
    save_every: Positive = 100
    """Steps between checkpoints; the last step is always saved."""
    on_save_error: Literal["raise", "warn"] = "raise"
    """A checkpoint cannot be saved: 'raise' ends the run at the next step; 'warn' goes on, if it is not the last."""
    check_every: Count = 0
    """Steps between checking that devices hold alike what they should, and then before each save, too; 0: never."""
    max_to_keep: Annotated[int, Ge(2)] = 2
    """Checkpoints to keep: two or more, so that there is one to go back to where the newest is damaged."""
    keep_period: Positive | None = None
    """Checkpoints of steps that are multiples of it are kept all the same."""
    tensorboard: bool = False
    """Write TensorBoard files, too (needs the extra: pip install 'shardadam[tensorboard]')."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's size."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    train_step: StepConfig = field(default_factory=StepConfig)
    """The train step."""
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)
    """When a process counts as stuck."""


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train_step": StepConfig,
    "deadlines": DeadlineConfig,
}


def load_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file into a checked `TrainConfig`. Inverse of `dump_config`.

    Raises:
      ConfigError: no such file, no YAML, an unknown key (with the nearest valid one), or a value out of range.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"config '{path}': cannot read it ({reason}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config '{path}': not valid YAML: {' '.join(str(error).split())}") from None
    return parse_config({} if raw is None else raw, str(path))


def dump_config(config: TrainConfig) -> str:
    """The config as YAML, every field written out. Inverse of `load_config`."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False)


def parse_config(raw: Any, where: str = "the command line") -> TrainConfig:
    """A mapping -> a `TrainConfig`, with numbers read from strings (PyYAML reads 6e-4 as one) and ranges checked."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(raw, TrainConfig, "", where)
    for section, kind in SECTIONS.items():
        if section in raw:
            _check_keys(raw[section], kind, f"{section}.", where)
    try:
        config = TypeAdapter(TrainConfig).validate_python(raw)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None
    _check_together(config, where)
    return config


def _check_keys(raw: Any, kind: type, prefix: str, where: str) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: '{prefix.rstrip('.') or 'the file'}' is {raw!r}; wanted a mapping of fields")
    valid = [f.name for f in fields(kind)]
    for key in raw:
        if key not in valid:
            raise ConfigError(f"{where}: unknown field '{prefix}{key}'; {_nearest(str(key), prefix, valid)}")


def _nearest(key: str, prefix: str, valid: list[str]) -> str:
    everywhere = {f"{prefix}{name}": name for name in valid}
    if not prefix:
        everywhere |= {f"{section}.{f.name}": f.name for section, kind in SECTIONS.items() for f in fields(kind)}
    own = difflib.get_close_matches(key, valid, n=1, cutoff=0.8)  # before a nearer one in another section
    close = own or difflib.get_close_matches(key, everywhere.values(), n=1, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{full}'" for full, name in everywhere.items() if name == close[0]) + "?"
    return "the fields are " + ", ".join(prefix + name for name in valid)


def _explain(detail: Any) -> str:
    # pydantic's loc also names the branch of a union and the kind of constraint: keep what the user wrote.
    names = {f.name for kind in (TrainConfig, *SECTIONS.values()) for f in fields(kind)}
    where = ".".join(str(part) for part in detail["loc"] if part in names)
    return f"'{where}' is {detail['input']!r}; {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _check_together(config: TrainConfig, where: str) -> None:
    """What no single field shows."""
    model, data, optimizer = config.model, config.data, config.optimizer
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    wrong = [
        (
            config.name in ("", "..") or Path(config.name).name != config.name,
            f"'name' is {config.name!r}; wanted the name of one directory",
        ),
        (model.d_model % heads, f"'model.d_model' is {model.d_model}, not divisible by 'model.num_heads', {heads}"),
        (
            model.d_model // heads % 2,
            f"'model.d_model' over 'model.num_heads' is {model.d_model // heads}; rotary positions need an even number",
        ),
        (heads % kv_heads, f"'model.num_kv_heads' is {kv_heads}, which does not divide 'model.num_heads', {heads}"),
        (data.files and data.tokens, "'data.files' and 'data.tokens' are both set; set one of them to null"),
        (
            not data.tokens and model.vocab_size < 257,
            f"'model.vocab_size' is {model.vocab_size}; bytes and the end-of-document token need 257 or more",
        ),
        (
            optimizer.warmup_steps >= optimizer.decay_steps,
            f"'optimizer.warmup_steps' is {optimizer.warmup_steps}, not below 'optimizer.decay_steps', "
            f"{optimizer.decay_steps}",
        ),
    ]
    for happens, message in wrong:
        if happens:
            raise ConfigError(f"{where}: {message}")
