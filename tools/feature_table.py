# SPDX-License-Identifier: Apache-2.0
"""Writes docs/features.md from the marks `@pytest.mark.feature(name, refused=..., flag=...)` of the tests.

    python tools/feature_table.py            # writes the page
    python tools/feature_table.py --check    # fails if it is not current

The tests are parsed, not imported. Every feature must be in `FEATURES`; one without a mark is listed as not tested.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/features.md"

FEATURES = {
    "Interfaces": (
        "`LLM`, offline",
        "`vllm serve`: completions, streaming, `AsyncLLM`",
        "`vllm run-batch`",
        "`vllm bench latency`",
        "`vllm bench throughput`",
        "`vllm bench serve`",
    ),
    "Generation": (
        "greedy decoding and sampling, batches of mixed lengths",
        "64 requests at once",
        "`logprobs` and `prompt_logprobs`",
        "beam search",
        "prompt embeddings",
        "structured output: xgrammar",
        "structured output: guidance",
        "structured output: outlines",
        "structured output: lm-format-enforcer",
    ),
    "Engine": (
        "eager mode and `torch.compile`",
        "prefix caching",
        "chunked prefill",
        "long context: 32k tokens in chunks",
        "speculative decoding: n-gram",
        "speculative decoding: draft model",
        "speculative decoding: Eagle-3 head in float",
        "speculative decoding: MTP layers",
        "LoRA adapters",
        "several LoRA adapters at once (`--max-loras`)",
        "reloading weights (`reload_weights`)",
        "weights loaded in place, also in portions, by a trainer",
        "weights sent tensor by tensor by vLLM's weight transfer",
        "`--dtype` by name",
        "sleep mode",
    ),
    "Models": (
        "embeddings and scores (`--runner pooling`)",
        "classification (`--runner pooling`), head with weights",
        "classification (`--runner pooling`), head without weights",
        "rewards (`--runner pooling`), values for each token",
        "vision-language models",
        "mixtures of experts",
    ),
    "Several processes": (
        "tensor parallelism (`--tensor-parallel-size`), also on one NUMA node",
        "pipeline parallelism (`--pipeline-parallel-size`), eager",
        "data parallelism (`--data-parallel-size`)",
        "expert parallelism (`--enable-expert-parallel`)",
        "Ray (`--distributed-executor-backend ray`), one node",
        "Ray, two nodes",
        "several nodes (`--nnodes`)",
    ),
    "Load formats": (
        "`--load-format auto`, `hf`, `safetensors`",
        "`--load-format runai_streamer`, files on disk",
        "`--load-format dummy`",
        "`--load-format fastsafetensors`",
        "`--load-format sharded_state`, saved by `save_sharded_state`",
        "`--load-format tensorizer`",
        "`--load-format pt`",
    ),
    "Beside other methods": ("other quantization methods, unaffected by this plugin",),
}

INTRODUCTION = """\
# vLLM's features with W4A4 checkpoints on CPUs

Made by `python tools/feature_table.py` from the tests, which say in a mark what they show. A feature *works* if a
test runs it with a quantized checkpoint and compares what it gives with an independent computation or with a plain run.
It is *refused* if a test sees it end in an error that says why. A test with a flag runs only where this environment
variable is 1, because it takes long or needs another package; `make test` runs the others. vLLM is 0.32.
"""


@dataclass(frozen=True)
class Mark:
    """One mark. `refused` is the reason that the error gives, "" if the feature works; `flag` a variable or ""."""

    name: str
    refused: str
    flag: str
    test: str


def marks(folder: Path) -> Iterator[Mark]:
    """The marks in the tests below `folder`."""
    for file in sorted(folder.rglob("test_*.py")):
        where = file.relative_to(folder.parent).as_posix()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found: list[ast.expr] = node.decorator_list
                name = f"{where}::{node.name}"
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "pytestmark":
                found, name = [node.value], where
            else:
                continue
            for call in (child for part in found for child in ast.walk(part)):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "feature":
                    yield _mark(call, name)


def _mark(call: ast.Call, test: str) -> Mark:
    values: dict[str, Any] = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
    return Mark(ast.literal_eval(call.args[0]), values.get("refused", ""), values.get("flag", ""), test)


def page(found: list[Mark]) -> str:
    """The text of the page.

    Raises:
        ValueError: a mark names a feature that is not in the table, or one both works and is refused.
    """
    known = {name for names in FEATURES.values() for name in names}
    if unknown := sorted({mark.name for mark in found} - known):
        raise ValueError(f"marks of features that tools/feature_table.py does not list: {', '.join(unknown)}")
    text = INTRODUCTION
    for group, names in FEATURES.items():
        text += f"\n## {group}\n\n| feature | | shown by |\n|---|---|---|\n"
        for name in names:
            mine = [mark for mark in found if mark.name == name]
            if len({bool(mark.refused) for mark in mine}) > 1:
                raise ValueError(f"{name}: one test says that it works, another that it is refused")
            text += f"| {name} | {_state(mine)} | {'<br>'.join(_link(mark) for mark in mine)} |\n"
    return text


def _state(mine: list[Mark]) -> str:
    if not mine:
        return "not tested"
    return f"refused: {mine[0].refused}" if mine[0].refused else "works"


def _link(mark: Mark) -> str:
    file, _, function = mark.test.partition("::")
    flag = f" (with `{mark.flag}=1`)" if mark.flag else ""
    return f"[{function or Path(file).name}](../{file}){flag}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write; fail if the page is not current")
    text = page(list(marks(ROOT / "tests")))
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not current: run python tools/feature_table.py")


if __name__ == "__main__":
    main()
