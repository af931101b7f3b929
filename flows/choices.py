"""The choices that a command offers: names only, so that `--help` imports nothing heavy."""

from __future__ import annotations

from enum import StrEnum


class StageName(StrEnum):
    """Where a run may end."""

    CATALOGUE = "catalogue"
    FETCH_MODEL = "fetch_model"
    INGEST = "ingest"
    SAMPLE = "sample"
    SHAREGPT = "sharegpt"
    TEMPLATE = "template"
    TOKENIZE = "tokenize"
    PACK = "pack"
    FINETUNE = "finetune"
    BASELINE = "baseline"
    EVALUATE = "evaluate"
    SAVE = "save"


class PoolType(StrEnum):
    """Where the runs of a pool live; each has a job template in deployments/pools/."""

    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


class CollisionStrategy(StrEnum):
    """A run beyond its deployment's concurrency limit waits, or is cancelled; in Prefect's words."""

    ENQUEUE = "ENQUEUE"
    CANCEL_NEW = "CANCEL_NEW"


class Format(StrEnum):
    """The form that a model is written in."""

    MERGED = "merged-16bit"
    GGUF = "gguf"
    ADAPTER = "adapter"


class Bits(StrEnum):
    """How a GGUF file holds its matrices."""

    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"


class Written(StrEnum):
    """The format of a file of products to measure with."""

    JSON_LINES = "json"
    CSV = "csv"
    PARQUET = "parquet"


class Against(StrEnum):
    """The other side of a comparison."""

    DOCUMENT = "document"


class Held(StrEnum):
    """How the base model's matrices lie in memory (finetune.frozen_weights)."""

    AUTO = "auto"
    PLAIN = "plain"
    FP8 = "fp8"
    FP8_BACKWARD = "fp8-backward"
    NF4 = "nf4"


class Shape(StrEnum):
    """A published model whose shape is measured with random weights."""

    LLAMA_3_8B = "llama-3-8b"
    LLAMA_3_70B = "llama-3-70b"
    LLAMA_31_8B = "llama-3.1-8b"
    LLAMA_32_1B = "llama-3.2-1b"
    QWEN_25_7B = "qwen2.5-7b"
    MISTRAL_7B_V03 = "mistral-7b-v0.3"
    GEMMA_2_9B = "gemma-2-9b"
