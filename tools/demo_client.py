# SPDX-License-Identifier: Apache-2.0
"""Requests of the demo to its servers."""

import json
import sys
import urllib.error
import urllib.request
from typing import Any

ANSWER_TIMEOUT_S = 300


class Client:
    """A client of a server that is ready.

    Attributes:
        name: under which it serves the model.
        ready_s: seconds from its start until it answered.
    """

    def __init__(self, name: str, port: int, ready_s: float) -> None:
        self.name = name
        self.ready_s = ready_s
        self._base = f"http://localhost:{port}/v1/"

    def url(self, path: str) -> str:
        """The address of an endpoint, such as `completions`."""
        return self._base + path

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """The answer to a request; the server's refusal ends the demo with its text."""
        return json.loads(self.ask_raw(path, json.dumps({"model": self.name, **fields})))

    def ask_raw(self, path: str, body: str) -> str:
        """The same, as text, of a body that is sent as it is."""
        request = urllib.request.Request(self.url(path), body.encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            sys.exit(f"{self.url(path)} refused a request with {error.code}: {error.read().decode()}")
