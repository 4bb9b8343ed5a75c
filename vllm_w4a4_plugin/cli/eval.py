# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 eval DIR`: perplexity and tasks of a checkpoint served by vLLM, and its distance from the float model."""

import argparse
import json
from pathlib import Path

from vllm_w4a4_plugin import envs
from vllm_w4a4_plugin.checkpoint import CheckpointError

from .progress import ProgressDisplay


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser(
        "eval", help="perplexity and tasks of a checkpoint through vLLM, and its distance from the float model"
    )
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--text", type=Path, help=".json (array of strings), .jsonl or .txt")
    parser.add_argument(
        "--against", type=Path, metavar="DIR",
        help="float model to compare with: perplexity, divergence of the predictions, tasks",
    )  # fmt: skip
    parser.add_argument("--float", dest="against", type=Path, help=argparse.SUPPRESS)  # an older name
    parser.add_argument("--window", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--windows", type=int, default=24, help="use at most this many windows (default: 24)")
    parser.add_argument("--dtype", default="auto", help="vLLM's dtype of activations (default: the model's)")
    parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, separated by commas")
    parser.add_argument("--task-dir", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    parser.add_argument("--limit", type=int, help="use at most this many examples of each task")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="tokens of a task's longest prompt with its answer (default: 2048)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with the distribution and worst passages"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; returns 0."""
    # vLLM writes its log to standard output unless it is told otherwise before it is imported.
    envs.set_default("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm_w4a4_plugin.calibration.data.texts import read_texts
    from vllm_w4a4_plugin.calibration.data.tokens import load_tokenizer
    from vllm_w4a4_plugin.evaluation.page import html_page
    from vllm_w4a4_plugin.evaluation.report import as_json, tables
    from vllm_w4a4_plugin.evaluation.run import evaluate
    from vllm_w4a4_plugin.evaluation.tasks import TaskOptions, check_tasks

    if args.text is None and args.tasks is None:
        raise CheckpointError("eval needs --text, --tasks, or both.")
    if args.window < 2 or args.windows < 1:
        raise CheckpointError("--window must be at least 2 and --windows at least 1")
    if args.max_length < 16 or (args.limit is not None and args.limit < 1):
        raise CheckpointError("--max-length must be at least 16 and --limit at least 1")
    texts = read_texts(args.text) if args.text is not None else []
    for directory in filter(None, (args.directory, args.against)):
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory}: has no config.json; give the directory of a model.")
    rows = _windows(texts, args) if texts else []
    tasks = None
    if args.tasks is not None:
        names = tuple(filter(None, (name.strip() for name in args.tasks.split(","))))
        tasks = TaskOptions(names, args.task_dir, args.limit, args.max_length)
        check_tasks(tasks)
    with ProgressDisplay(" steps") as progress:
        evaluation = evaluate(args.directory, args.against, rows, tasks, args.dtype, progress.show)
    facts = as_json(evaluation, load_tokenizer(args.directory).decode)
    print(json.dumps(facts, indent=2) if args.json else tables(evaluation))
    if args.html is not None:
        args.html.write_text(html_page(facts), encoding="utf-8")
    return 0


def _windows(texts: list[str], args: argparse.Namespace) -> list[list[int]]:
    """Consecutive windows of the texts joined by two newlines.

    Raises:
        CheckpointError: there is not enough text, or the tokenizer of the float model is another one.
    """
    from vllm_w4a4_plugin.calibration.data.tokens import join_texts, load_tokenizer

    ids = join_texts(texts, load_tokenizer(args.directory))
    if args.against is not None and join_texts(texts, load_tokenizer(args.against)) != ids:
        raise CheckpointError(
            f"{args.against}: its tokenizer divides the text into other tokens than that of {args.directory}, so that "
            "the predictions cannot be compared. Give the float model that the checkpoint was made from."
        )
    rows = [ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)][: args.windows]
    if not rows:
        raise CheckpointError(f"{args.text}: {len(ids)} tokens are fewer than one window of {args.window}.")
    return rows
