"""Messages of ComfyUI's websocket to one client, read by a thread, for code that is not async."""

import asyncio
import collections
import queue
import threading
import time

import aiohttp

Event = collections.namedtuple("Event", "type data")


class Events:
    """An iterator-like view of the messages: `next`, `wait_for`; `seen` keeps the messages read so far.

    Text messages are Event(type, data). Binary ones (previews) are Event("binary", bytes). The client's id is
    `client_id`. Pass it to `queue`, or ComfyUI sends progress to nobody.
    """

    def __init__(self, url, client_id):
        self.client_id = client_id
        self.seen = []
        self._url = f"{url}/ws?clientId={client_id}"
        self._arrived = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._connected = threading.Event()
        self._task = None

    def __enter__(self):
        self._thread.start()
        if not self._connected.wait(30):
            raise ConnectionError(f"no websocket at {self._url}")
        return self

    def __exit__(self, *_):
        if self._task is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def next(self, timeout=60):
        """Return the next message. Raise TimeoutError if none comes, ConnectionError if the connection has ended."""
        try:
            event = self._arrived.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no message within {timeout} s; the last was {self.seen[-1:]}") from None
        if event is None:
            self._arrived.put(None)
            raise ConnectionError("the websocket was closed")
        self.seen.append(event)
        return event

    def wait_for(self, type, timeout=60, **fields):
        """Return the next message of a type whose data has these fields; earlier ones are in `seen`."""
        deadline = time.monotonic() + timeout
        while True:
            event = self.next(max(0.01, deadline - time.monotonic()))
            if event.type == type and all(event.data.get(name) == value for name, value in fields.items()):
                return event

    def follow(self, prompt_id, timeout=600):
        """Yield the messages until a prompt has ended, with its end as the last one."""
        ends = {"execution_success", "execution_error", "execution_interrupted"}
        deadline = time.monotonic() + timeout
        while True:
            event = self.next(max(0.01, deadline - time.monotonic()))
            yield event
            if event.type in ends and event.data.get("prompt_id") == prompt_id:
                return

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._read())
        try:
            self._loop.run_until_complete(self._task)
        except (asyncio.CancelledError, aiohttp.ClientError):
            # __exit__ closed the connection, or there is no server; `next` reports the end.
            pass
        finally:
            self._arrived.put(None)
            self._loop.close()

    async def _read(self):
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(self._url, max_msg_size=0) as socket:
                self._connected.set()
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        body = message.json()
                        self._arrived.put(Event(body["type"], body["data"]))
                    elif message.type == aiohttp.WSMsgType.BINARY:
                        self._arrived.put(Event("binary", message.data))
