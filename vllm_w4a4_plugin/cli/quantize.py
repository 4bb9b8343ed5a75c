# SPDX-License-Identifier: Apache-2.0
"""`vllm-w4a4 quantize MODEL --output DIR`: a float Hugging Face model becomes a W4A4 FlatQuant checkpoint."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_w4a4_plugin.text import format_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_w4a4_plugin.calibration.model import StreamedModel
    from vllm_w4a4_plugin.calibration.pipeline import BlockRecord, Settings
    from vllm_w4a4_plugin.calibration.progress import Progress
    from vllm_w4a4_plugin.calibration.recipe import Recipe

DEFAULT_RECIPE = "tutorial"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command's arguments."""
    parser = subparsers.add_parser("quantize", help="make a W4A4 checkpoint from a float Hugging Face model")
    # The second spelling of an argument is that of msModelSlim's script, so that its command lines work here.
    parser.add_argument("model", nargs="?", type=Path, help="directory of the float model")
    parser.add_argument("--model_path", dest="model_path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", "--save_directory", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--calib-file", "--calib_file", type=Path,
        help="calibration text: .json (array of strings), .jsonl or .txt; without it the model writes its own",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", help="tutorial, w4a4-w8a8, all-w4a4, w4a4-dynamic or a .yaml file (default: tutorial)"
    )
    parser.add_argument(
        "--keep-float", action="append", default=[], metavar="PATTERN",
        help="leave layers whose full name matches as they are, e.g. 'model.layers.0.*'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR",
        help="a checkpoint made from MODEL, here or by msModelSlim: only distil it",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of rotations and self-written text (default: 0)")
    parser.add_argument(
        "--device", default="cpu",
        help="cpu, cuda, npu, cuda:1, ...; several with commas between them share the work (default: cpu)",
    )  # fmt: skip
    parser.add_argument("--calib-tokens", type=int, default=16384, help="use at most so many tokens (default: 16384)")
    parser.add_argument(
        "--seq-len", type=int, default=512,
        help="tokens per row; text that the model writes has at most 256 (default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--gradients", action="store_true",
        help="weigh tokens by the squared gradient of the loss: a forward and a backward pass more, measure before use",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=int, metavar="STEPS",
        help="train scales, clips, norms and transforms towards the float model's predictions, at most 256 tokens of "
        "calibration text a step; the whole model must fit into memory in float32 (default: 16 for models below "
        "300 million parameters, else 0)",
    )  # fmt: skip
    parser.add_argument(
        "--activations-on-disk", action="store_true",
        help="keep one block's activations in files beside the output instead of in memory",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run at its last finished block")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")
    parser.add_argument(
        "--trust_remote_code", nargs="?", const=True, type=_truth, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument("--batch_size", type=int, help=argparse.SUPPRESS)  # msModelSlim's; changes nothing here
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Quantize; returns 0."""
    from transformers import AutoTokenizer

    from vllm_w4a4_plugin.calibration.errors import CalibrationError
    from vllm_w4a4_plugin.calibration.model import StreamedModel
    from vllm_w4a4_plugin.calibration.pipeline import Quantization, Settings, check_output
    from vllm_w4a4_plugin.calibration.report import REPORT_FILE, render
    from vllm_w4a4_plugin.calibration.rotation import RotatedModel
    from vllm_w4a4_plugin.calibration.team import Team

    devices = _devices(args.device)
    args.device = str(devices[0])
    source = args.model or args.model_path
    if source is None:
        raise CalibrationError("give the directory of the float model: vllm-w4a4 quantize MODEL --output DIR")
    started = time.monotonic()
    check_output(args.output, args.resume)
    recipe = _recipe(args)
    if args.calib_file:
        from vllm_w4a4_plugin.calibration.data import read_texts

        texts = read_texts(args.calib_file)
    if recipe.rotates_residual:
        model: StreamedModel = RotatedModel(source, args.device, args.trust_remote_code, args.seed)
    else:
        model = StreamedModel(source, args.device, args.trust_remote_code)
    recipe.check_patterns(model.linear_names())
    distill = _default_distillation(model.config.get_text_config()) if args.distill is None else args.distill
    if args.start_from and not distill:
        raise CalibrationError("--start-from only distils: say with --distill for how many steps")
    settings = Settings(args.seed, weigh_tokens=args.gradients, distill=distill)
    ids = None
    if args.calib_file:
        from vllm_w4a4_plugin.calibration.data import token_rows

        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        ids = token_rows(texts, tokenizer, args.seq_len, args.calib_tokens, str(args.calib_file))
    _announce(args, model, recipe, settings, None if ids is None else ids.numel())
    if ids is None:
        ids = _own_text(args, source)
    quantization = Quantization(
        model,
        recipe,
        settings,
        ids,
        args.output,
        args.resume,
        args.activations_on_disk,
        Team(devices),
        args.start_from,
    )

    def report(records: "list[BlockRecord]", nbytes: int) -> dict[str, str]:
        before = sum(tensor.nbytes for tensor in model.tensors.values())
        facts = [
            ("model", source.resolve().name),
            ("recipe", f"that of {args.start_from.name}" if args.start_from else args.recipe or DEFAULT_RECIPE),
            (
                "calibration text",
                f"{args.calib_file.name if args.calib_file else 'written by the model'}, {ids.numel()} tokens",
            ),
            ("seed", str(args.seed)),
            ("steps of distillation", str(distill)),
            ("size", f"{nbytes / 1e6:.1f} MB (float: {before / 1e6:.1f} MB)"),
            ("time", f"{time.monotonic() - started:.0f} s"),
        ]
        return {REPORT_FILE: render(f"{source.resolve().name}: quantization report", facts, records)}

    with _Bars() as bars:
        try:
            records, nbytes = quantization.run(bars.show, report)
        except KeyboardInterrupt:
            print(f"\n{bars}; the same command with --resume continues.")
            raise
    print(_table(records))
    seconds = time.monotonic() - started
    print(f"\n{args.output}: {nbytes / 1e6:.1f} MB in {seconds:.0f} s; {REPORT_FILE} shows the details.")
    print(f"Serve it: vllm serve {args.output} --quantization ascend")
    return 0


def _announce(
    args: argparse.Namespace, model: "StreamedModel", recipe: "Recipe", settings: "Settings", tokens: int | None
) -> None:
    """Say what the run will need and what an NPU will not take; refuse a disk that is too small.

    Args:
        tokens: of the calibration file, None if the model is to write its own text.
    """
    from vllm_w4a4_plugin.calibration.budget import estimate, free_disk, free_memory
    from vllm_w4a4_plugin.calibration.distill import STEP_TOKENS
    from vllm_w4a4_plugin.calibration.errors import CalibrationError
    from vllm_w4a4_plugin.calibration.pipeline import work_directory

    config = model.config.get_text_config()
    need = estimate(
        config,
        model.tensors,
        recipe,
        tokens or args.calib_tokens,
        args.device,
        gradients=settings.weigh_tokens,
        distill=settings.distill * min(args.seq_len, STEP_TOKENS),
        own_text=0 if tokens else args.calib_tokens,
        on_disk=args.activations_on_disk,
    )
    print(f"{model.directory}: {len(model)} blocks; needs {need}", file=sys.stderr)
    for objection in recipe.npu_objections(config):
        print(f"Note on NPUs: {objection}", file=sys.stderr)
    memory = free_memory()
    if args.device == "cpu" and memory < need.memory:
        advice = "" if tokens else " The model is whole in memory while it writes text; --calib-file avoids that."
        print(f"Note: only {memory / 1e9:.1f} GB of memory are free.{advice}", file=sys.stderr)
    # What an interrupted run has written already is part of what is needed.
    free = free_disk(args.output) + sum(f.stat().st_size for f in work_directory(args.output).glob("*"))
    if free < need.disk:
        raise CalibrationError(
            f"{args.output}: {free / 1e9:.3g} GB of disk are free, {need.disk / 1e9:.3g} GB are needed. Free some or "
            "choose another place."
        )


def _truth(value: str) -> bool:
    """The value of msModelSlim's `--trust_remote_code True`."""
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {value!r}")
    return value.lower() == "true"


class _Bars:
    """A progress bar, with the time left, for each phase of a run."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __str__(self) -> str:
        return "at the start" if self._bar is None else f"{self._bar.desc}: {self._bar.n} of {self._bar.total}"

    def show(self, progress: "Progress") -> None:
        """A listener of the run."""
        if self._bar is None or self._bar.desc != progress.phase:
            if self._bar is not None:
                self._bar.close()
            # What an earlier, interrupted run did took no time in this one.
            self._bar = tqdm(total=progress.total, initial=progress.done, desc=progress.phase)
        self._bar.set_postfix_str(progress.detail, refresh=False)
        self._bar.update(progress.done - self._bar.n)
        self._bar.refresh()


def _recipe(args: argparse.Namespace) -> "Recipe":
    """What to quantize how; nothing, where a checkpoint is only to be distilled."""
    from vllm_w4a4_plugin.calibration.errors import CalibrationError
    from vllm_w4a4_plugin.calibration.recipe import Recipe, load_recipe
    from vllm_w4a4_plugin.calibration.structure import Role
    from vllm_w4a4_plugin.checkpoint import QuantType

    if not args.start_from:
        return load_recipe(args.recipe or DEFAULT_RECIPE, args.keep_float)
    if args.recipe or args.keep_float or args.gradients:
        raise CalibrationError(
            "--start-from takes layers as that checkpoint has them: leave out --recipe, --keep-float and --gradients"
        )
    return Recipe(dict.fromkeys(Role, QuantType.FLOAT))


def _default_distillation(config: Any) -> int:
    """Steps: a few where the whole model in memory is no burden, else none."""
    from vllm_w4a4_plugin.calibration.distill import DEFAULT_STEPS, DEFAULT_UP_TO
    from vllm_w4a4_plugin.calibration.structure import group_shapes

    parameters = config.num_hidden_layers * sum(out * n for out, n in group_shapes(config).values())
    return DEFAULT_STEPS if parameters <= DEFAULT_UP_TO else 0


def _devices(names: str) -> "list[torch.device]":
    import importlib

    import torch

    from vllm_w4a4_plugin.calibration.errors import CalibrationError

    result = []
    for name in names.split(","):
        try:
            if name.startswith("npu"):
                importlib.import_module("torch_npu")  # makes the device known to torch
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise CalibrationError(f"--device: {name!r} cannot be used on this machine: {reason}") from None
        result.append(torch.device(name))
    return result


def _own_text(args: argparse.Namespace, source: Path) -> "Tensor":
    """Text that the model writes, kept in the work directory for a run that is continued."""
    import hashlib

    from safetensors.torch import load_file

    from vllm_w4a4_plugin.calibration.errors import CalibrationError
    from vllm_w4a4_plugin.calibration.files import save_tensors
    from vllm_w4a4_plugin.calibration.pipeline import stamps, work_directory
    from vllm_w4a4_plugin.calibration.selfwrite import ROW_TOKENS, write_text

    length = min(args.seq_len, args.calib_tokens, ROW_TOKENS)
    rows = args.calib_tokens // length
    key = hashlib.sha256(repr((stamps(source), args.seed, rows, length)).encode()).hexdigest()
    file = work_directory(args.output) / f"text-{key[:16]}.safetensors"
    if file.exists():
        return load_file(file)["ids"]
    with tqdm(total=rows * length, unit=" tokens", desc=f"Writing {rows} texts", leave=False) as bar:

        def show(count: int) -> None:
            bar.update(count - bar.n)

        ids = write_text(source, args.device, rows, length, args.seed, args.trust_remote_code, show)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"ids": ids}, file)
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be written: {error}") from None
    return ids


def _table(records: "Sequence[BlockRecord]") -> str:
    from vllm_w4a4_plugin.calibration.report import LAYER_HEADER, layer_row

    rows: list[list[Any]] = [layer_row(layer) for record in records for layer in record.layers()]
    return format_table(LAYER_HEADER, rows)
