# SPDX-License-Identifier: Apache-2.0
"""Serve a W4A4 checkpoint with `vllm serve` and send it the tutorial's request; `make demo` runs this.

Without a checkpoint, it first downloads a small language model and quantizes it.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORK = Path("build/demo")
START_TIMEOUT_S = 600
# vLLM does not start unless this fraction of the machine's memory is free, however little the model needs.
MODEST_MEMORY = ("--gpu-memory-utilization", "0.3")
# The tutorial's request, in which numbers are strings as well.
REQUEST = """{
        "model": "%s",
        "prompt": "what is large language model?",
        "max_tokens": "128",
        "top_p": "0.95",
        "top_k": "40",
        "temperature": "0.0"
    }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="checkpoint directory (default: one is made in build/demo)")
    args = parser.parse_args()
    from demo_model import make_checkpoint  # in this file's directory, since it is run as a script

    began = time.monotonic()
    model = args.model or make_checkpoint(WORK)
    if not (model / "config.json").is_file():
        sys.exit(f"{model}: contains no config.json. Give the directory of a checkpoint: make demo MODEL=dir")
    name = model.resolve().name.lower()
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--served-model-name", name,
        "--max-model-len", "1024", "--quantization", "ascend", "--port", str(port), *MODEST_MEMORY,
    ]  # fmt: skip
    print("$", shlex.join(["vllm", *command[1:]]), flush=True)
    started = time.monotonic()
    with running(command) as server:
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health")
        print(f"\nThe server was ready after {time.monotonic() - started:.0f} s.\n", flush=True)
        ask(f"http://localhost:{port}/v1/completions", REQUEST % name)
    print(f"The demo took {time.monotonic() - began:.0f} s in total.")


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server process, which is terminated at the end. Its output is shown until then."""
    # A gigabyte of KV cache is plenty for a demonstration; vLLM's default takes half of the machine's memory.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
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
            time.sleep(1)
    sys.exit(f"vllm serve was not ready within {START_TIMEOUT_S} s")


def ask(url: str, body: str) -> None:
    print(f"$ curl {url} \\\n    -H \"Content-Type: application/json\" \\\n    -d '{body}'", flush=True)
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=300) as response:
        print(response.read().decode())
    print(f"\nAnswered in {time.monotonic() - started:.1f} s.", flush=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
