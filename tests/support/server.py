"""A real ComfyUI server as a subprocess, on a free loopback port and its own base directory.

It starts as users start it, in one of STYLES: by default from another folder, with --base-directory.

    with ComfyServer(folder) as server:
        entry = server.run(prompt)
        pictures = server.download(entry)
"""

import atexit
import collections
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from .events import Events
from .host import ROOT, find_comfyui
from .pack import make_base

PACK_FOLDER = "graft"
# Working directory and call of main.py, by name. All but the last write into ComfyUI's own folder.
STYLES = ("folder", "relative", "absolute", "base-directory")
ARGUMENTS = ["--cpu", "--use-pytorch-cross-attention", "--disable-auto-launch", "--disable-api-nodes"]

Output = collections.namedtuple("Output", "node kind filename subfolder type")


class ServerError(RuntimeError):
    """The server did not start, or died; the message ends with its log's last lines."""


class PromptError(RuntimeError):
    """A prompt was refused, failed or was interrupted.

    node_errors holds the server's validation errors, error the `execution_error` or `execution_interrupted` message,
    entry the history entry if there is one.
    """

    def __init__(self, message, node_errors=None, error=None, entry=None):
        super().__init__(message)
        self.node_errors = node_errors or {}
        self.error = error or {}
        self.entry = entry


class PromptRefused(PromptError):
    """Validation refused the prompt: nothing ran."""


class PromptInterrupted(PromptError):
    """The prompt was cancelled."""


class ComfyServer:
    """One server process; `start` after `stop` or `kill` keeps the base directory and the port."""

    def __init__(self, base, comfy=None, pack=ROOT, arguments=(), env=None, style="base-directory"):
        self.base = Path(base).resolve()
        self.comfy = Path(comfy) if comfy else find_comfyui()
        self.style = style
        if style != "base-directory":
            self.comfy = copy_comfyui(self.comfy, self.base)
        make_base(self.base)
        # The picture that ComfyUI brings along, which workflows name.
        picture = self.base / "input" / "example.png"
        if not picture.exists() and (self.comfy / "input" / "example.png").exists():
            shutil.copy(self.comfy / "input" / "example.png", picture)
        self.arguments = list(arguments)
        self.env = dict(env or {})
        self.port = None
        self.process = None
        self.log = self.base / "server.log"
        if pack:
            link(pack, self.base / "custom_nodes" / PACK_FOLDER)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    # The process

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout=180):
        """Start the process and wait until it answers; raise ServerError with the log's tail."""
        if self.is_running():
            return self
        self.port = self.port or find_free_port()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.comfy if self.style == "folder" else self.base.parent,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.kill)
        self._wait_until_ready(timeout)
        return self

    def stop(self, timeout=20):
        """Ask the server to end, as Ctrl-C does, then kill it if it is still running."""
        if self.is_running():
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()

    def kill(self):
        """Kill the server with kill -9, as a crash or a power cut would."""
        if self.is_running():
            self._signal(signal.SIGKILL)
            self.process.wait()
        atexit.unregister(self.kill)

    def restart(self, timeout=180):
        """Stop, then start with the same base directory and port."""
        self.stop()
        return self.start(timeout)

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def read_log(self, lines=None):
        """Return the log of all starts so far, or its last lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    # Prompts

    def queue(self, prompt, extra_data=None, client_id=None):
        """Queue an API-format prompt; return its id. Raise PromptRefused if it is refused."""
        return self.submit(prompt, extra_data, client_id)["prompt_id"]

    def submit(self, prompt, extra_data=None, client_id=None):
        """Queue a prompt and return the whole answer; `node_errors` names the outputs that will not run."""
        body = {"prompt": prompt, "extra_data": extra_data or {}}
        if client_id:
            body["client_id"] = client_id
        try:
            return self.post("/prompt", body)
        except urllib.error.HTTPError as refusal:
            answer = json.loads(refusal.read())
            raise PromptRefused(describe_refusal(answer), node_errors=answer.get("node_errors")) from None

    def wait(self, prompt_id, timeout=600):
        """Return the history entry of a finished prompt; raise PromptError if it failed or was interrupted."""
        entry = self.poll(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), timeout, f"prompt {prompt_id}")
        messages = dict(entry["status"]["messages"])
        if "execution_interrupted" in messages:
            message = f"prompt {prompt_id} was interrupted"
            raise PromptInterrupted(message, error=messages["execution_interrupted"], entry=entry)
        if entry["status"]["status_str"] != "success":
            error = messages.get("execution_error", {})
            raise PromptError(_describe_error(error), error=error, entry=entry)
        return entry

    def run(self, prompt, extra_data=None, client_id=None, timeout=600):
        """Queue a prompt, wait for it, and return the history entry."""
        return self.wait(self.queue(prompt, extra_data, client_id), timeout)

    def listen(self, client_id=None):
        """Return a context manager of the websocket's messages to a client, from now on; see Events."""
        return Events(self.url, client_id or uuid.uuid4().hex)

    def interrupt(self):
        """Cancel the running prompt."""
        self.post("/interrupt", {})

    def clear_queue(self):
        """Remove the waiting prompts."""
        self.post("/queue", {"clear": True})

    def is_idle(self):
        """Report whether nothing runs and nothing waits."""
        queue = self.get("/queue")
        return not queue["queue_running"] and not queue["queue_pending"]

    def free(self):
        """Unload the models and drop the cached outputs, as the button does."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        # ComfyUI does so when its queue is idle, or after a prompt, so this one makes sure of it.
        empty = {"class_type": "EmptyImage", "inputs": {"width": 1, "height": 1, "batch_size": 1, "color": 0}}
        self.run({"1": empty, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})

    # Nodes and outputs

    def object_info(self, node=None):
        """Return the schemas of all nodes, or of one."""
        return self.get(f"/object_info/{urllib.parse.quote(node)}" if node else "/object_info")

    def list_outputs(self, entry):
        """Yield every file in a history entry's outputs."""
        for node, output in entry["outputs"].items():
            for kind, items in output.items():
                for item in items if isinstance(items, list) else []:
                    if isinstance(item, dict) and "filename" in item:
                        yield Output(
                            node, kind, item["filename"], item.get("subfolder", ""), item.get("type", "output")
                        )

    def view(self, filename, subfolder="", type="output"):
        """Return the bytes of a file below output/, input/ or temp/."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return self.request(f"/view?{query}")

    def download(self, entry, node=None):
        """Return the bytes of a history entry's files, of one node or of all, in order."""
        outputs = [output for output in self.list_outputs(entry) if node in (None, output.node)]
        return [self.view(output.filename, output.subfolder, output.type) for output in outputs]

    def path(self, *parts):
        """Return a path below the base directory."""
        return self.base.joinpath(*parts)

    # HTTP

    def get(self, path):
        return json.loads(self.request(path))

    def post(self, path, body):
        answer = self.request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def request(self, path, data=None, timeout=60):
        """Send a GET, or a POST if there is data; return the answer's bytes."""
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            if self.is_running():
                raise
            raise ServerError(self._describe_end()) from error

    def poll(self, check, timeout, what):
        """Call `check` until it returns a true value; raise when the server dies or the time is over."""
        deadline = time.monotonic() + timeout
        pause = 0.05
        while time.monotonic() < deadline:
            found = check()
            if found:
                return found
            if not self.is_running():
                raise ServerError(self._describe_end())
            time.sleep(pause)
            pause = min(0.5, pause * 1.3)
        raise TimeoutError(f"{what} not done after {timeout} s; the log ends:\n{self.read_log(20)}")

    # Internals

    def _command(self):
        called = {"folder": "main.py", "relative": f"{self.base.name}/main.py"}
        main = called.get(self.style, str(self.comfy / "main.py"))
        # If the system supports it, the server dies with this process, however that ends.
        leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*leash, sys.executable, main, *ARGUMENTS, "--listen", "127.0.0.1", "--port", str(self.port)]
        if self.style == "base-directory":
            database = self.base / "user" / "comfyui.db"
            command += ["--base-directory", str(self.base), "--database-url", f"sqlite:///{database}"]
        return command + self.arguments

    def _environment(self):
        # Keep Python's own search path, because this ComfyUI may need it.
        quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return {**os.environ, **quiet, **self.env}

    def _wait_until_ready(self, timeout):
        def answers():
            with contextlib.suppress(OSError, ServerError):
                return self.request("/system_stats", timeout=5)

        try:
            self.poll(answers, timeout, "the start of ComfyUI")
        except BaseException:
            self.kill()
            raise

    def _signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _describe_end(self):
        code = self.process.returncode if self.process else None
        return f"ComfyUI is not running (exit code {code}); its log {self.log} ends:\n{self.read_log(40)}"


# Requests to loopback never use a proxy.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def link(target, path):
    """Create a symbolic link at path to target; replace a link that leads elsewhere."""
    target = Path(target).resolve()
    if path.is_symlink() and path.resolve() != target:
        path.unlink()
    if not path.exists():
        path.symlink_to(target)


def copy_comfyui(comfy, folder):
    """Install ComfyUI's files into a folder, by hard links if possible; return the folder."""

    def place(source, target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    def leave_out(path, names):
        # Folders with users' files, which the tests create themselves.
        own = {"models", "custom_nodes", "input", "output", "temp", "user", ".git"}
        return own & set(names) if Path(path) == comfy else {"__pycache__"} & set(names)

    if not (folder / "main.py").exists():
        shutil.copytree(comfy, folder, copy_function=place, ignore=leave_out, dirs_exist_ok=True)
    return folder


def find_free_port():
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def describe_refusal(answer):
    told = {"message": "", "details": "", **(answer.get("error") or {"message": "an output of several"})}
    lines = ["{message}: {details}".format_map(told)]
    for node, report in (answer.get("node_errors") or {}).items():
        for error in report["errors"]:
            lines.append(f"node {node} ({report['class_type']}): {error['message']}: {error['details']}")
    return "the prompt was refused: " + "\n".join(lines)


def _describe_error(error):
    where = f"node {error.get('node_id')} ({error.get('node_type')})"
    trace = "".join(error.get("traceback") or [])
    return f"{where} failed: {error.get('exception_type')}: {error.get('exception_message')}\n{trace}".rstrip()
