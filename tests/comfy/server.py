"""ComfyUI's real server as a process: started, posted to, watched and stopped. It is run and never imported."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class Refused(Exception):
    """The server took no graph: what it said."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__(json.dumps(said)[:3000])
        self.said = said


class Server:
    """A headless server on the loopback.

    Args:
        comfyui: a checkout. python: the interpreter that runs it. folder: where it writes.
    """

    def __init__(self, comfyui: Path, python: Path, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.output, self.log = folder / "output", folder / "server.log"
        folder.mkdir(parents=True, exist_ok=True)
        command = [str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes"]
        for kind in ("output", "temp", "user", "input"):  # nothing is written into the checkout
            (folder / kind).mkdir(parents=True, exist_ok=True)
            command += [f"--{kind}-directory", str(folder / kind)]
        if "--database-url" in (comfyui / "comfy" / "cli_args.py").read_text():  # there is none in older ones
            command += ["--database-url", f"sqlite:///{folder / 'comfyui.db'}"]
        command += ["--preview-method", "auto", *options]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._file = self.log.open("w")
        self.process = subprocess.Popen(command, cwd=comfyui, stdout=self._file, stderr=subprocess.STDOUT, env=env)

    def wait_until_up(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise RuntimeError(f"no server: {self.log.read_text()[-3000:]}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from error
        return json.loads(text) if text else None

    def queue(self, graph: dict[str, Any], client: str = "test", **extra: Any) -> str:
        """Post a graph; its id.

        Raises:
            Refused: it is not valid.
        """
        body = {"prompt": graph, "client_id": client} | ({"extra_data": extra} if extra else {})
        return str(self.post("/prompt", body)["prompt_id"])

    def result(self, id: str, seconds: float = 300) -> dict[str, Any]:
        """What came of a graph, when it has ended in whatever way."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{id}")
            if id in history:
                found: dict[str, Any] = history[id]
                return found
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-3000:])

    def run(self, graph: dict[str, Any], **extra: Any) -> dict[str, Any]:
        return self.result(self.queue(graph, **extra))

    def files(self, result: dict[str, Any]) -> list[Path]:
        """The pictures of a result."""
        images = [i for out in result["outputs"].values() for i in out.get("images", [])]
        return [self.output / i["subfolder"] / i["filename"] for i in images if i["type"] == "output"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._file.close()
