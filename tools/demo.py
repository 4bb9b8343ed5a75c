# SPDX-License-Identifier: Apache-2.0
"""Serve a W4A4 checkpoint with `vllm serve` and send it the tutorial's request; `make demo` runs this.

Without a checkpoint, it first downloads a small language model, quantizes it, and shows what both models answer.
"""

import argparse
import io
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools.demo_client import Client
from tools.demo_comparison import Measured, measure, table
from tools.demo_model import make_models

WORK = Path("build/demo")
START_TIMEOUT_S = 600
# vLLM does not start unless this fraction of the machine's memory is free, however little the model needs.
MODEST_MEMORY = ("--gpu-memory-utilization", "0.3")
ENVIRONMENT = {
    # A gigabyte of KV cache is plenty for a demonstration; vLLM's default takes half of the machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # The server's output goes through a pipe, in which vLLM's progress bars are lines.
    "TQDM_MININTERVAL": "10",
    "TQDM_DELAY": "10",
}
# The tutorial's request, in which numbers are strings as well.
REQUEST = """{
        "model": "%s",
        "prompt": "what is large language model?",
        "max_tokens": "128",
        "top_p": "0.95",
        "top_k": "40",
        "temperature": "0.0"
    }"""
QUANTIZED = ("--quantization", "ascend")
# W4A4 models run without torch.compile by default. The float model does so here too, which saves a minute or two.
FLOAT = ("--enforce-eager",)
NEXT = """\
What to do next:
  vllm serve {checkpoint} --quantization ascend
      serve this model yourself
  vllm-w4a4 inspect {checkpoint}
      see what the checkpoint contains
  vllm-w4a4 quantize MODEL --output DIR --calib-file text.json
      quantize a model of your own (docs/quantize.md)
  make demo MODEL=DIR
      serve a checkpoint that you have"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="checkpoint directory (default: one is made in build/demo)")
    args = parser.parse_args()
    began = time.monotonic()
    if args.model:
        if not (args.model / "config.json").is_file():
            sys.exit(f"{args.model}: contains no config.json. Give the directory of a checkpoint: make demo MODEL=dir")
        with serving(args.model, QUANTIZED) as client:
            send_tutorial_request(client)
    else:
        compare(*make_models(WORK))
    print(f"\nThe demo took {time.monotonic() - began:.0f} s in total.")


def compare(float_model: Path, checkpoint: Path) -> None:
    """Serve one model after the other; print what both did, and the tutorial's request to the quantized one."""
    measured: list[Measured] = []
    with serving(float_model, FLOAT) as client:
        measured.append(measure(client, "float", float_model))
    with serving(checkpoint, QUANTIZED) as client:
        measured.append(measure(client, "W4A4", checkpoint))
        print(table(measured))
        send_tutorial_request(client)
    print("\n" + NEXT.format(checkpoint=checkpoint))


def send_tutorial_request(client: Client) -> None:
    """Print the request as a command for curl, and the server's answer."""
    body, url = REQUEST % client.name, client.url("completions")
    print(f"$ curl {url} \\\n    -H \"Content-Type: application/json\" \\\n    -d '{body}'", flush=True)
    started = time.monotonic()
    print(client.ask_raw("completions", body))
    print(f"\nAnswered in {time.monotonic() - started:.1f} s.", flush=True)


@contextmanager
def serving(model: Path, options: Sequence[str]) -> Iterator[Client]:
    """Run `vllm serve` until the end of the context, and show its command and its output."""
    name, port = model.resolve().name.lower(), free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--served-model-name", name,
        "--max-model-len", "1024", "--disable-uvicorn-access-log", *options, "--port", str(port), *MODEST_MEMORY,
    ]  # fmt: skip
    print("$", shlex.join(["vllm", *command[1:]]), flush=True)
    started = time.monotonic()
    with running(command) as server:
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health")
        ready_s = time.monotonic() - started
        print(f"\nThe server was ready after {ready_s:.0f} s.\n", flush=True)
        yield Client(name, port, ready_s)


@contextmanager
def running(command: list[str], variables: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The server process, which is terminated at the end. Its output is shown until then.

    Args:
        variables: of its environment, besides those of this process.
    """
    environment = {**ENVIRONMENT, **os.environ, **(variables or {})}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ending = threading.Event()
    echo = threading.Thread(target=show_output, args=(server, ending), daemon=True)
    echo.start()
    try:
        yield server
    finally:
        # The output of a server that is being terminated looks like errors; it is not shown.
        ending.set()
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        echo.join(10)


def show_output(server: subprocess.Popen[bytes], ending: threading.Event) -> None:
    """Copy the server's output to ours. All of it is read, so that the server never blocks on a full pipe."""
    stream = server.stdout
    assert isinstance(stream, io.BufferedReader)
    while chunk := stream.read1(65536):
        if not ending.is_set():
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"vllm serve exited with code {server.returncode} before it was ready; see its output above")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"vllm serve was not ready within {START_TIMEOUT_S} s")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
