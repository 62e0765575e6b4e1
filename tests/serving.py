"A real OpenAI-compatible HTTP endpoint that fails on demand, for judges, writers and readers."

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Endpoint:
    """Answer with each of `fails` in turn, and then with what `answer` makes.

    One of `fails` is a status, `slow`, `torn`, `drop`, or a text that is sent as it is.
    A failure echoes the key that it was sent, so that a test can see it leak.
    While `dead`, every answer is 503. `after` is the Retry-After of 429 and 503.
    """

    after, says = "0", ""

    def __init__(self):
        self.fails, self.asked, self.headers, self.bodies, self.dead, self.lock = (
            [],
            0,
            [],
            [],
            False,
            threading.Lock(),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked += 1
                    outer.headers.append(dict(self.headers))
                    outer.bodies.append(body)
                    fail = 503 if outer.dead else outer.fails.pop(0) if outer.fails else None
                if fail == "slow":
                    time.sleep(0.6)
                if fail == "drop":
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                echo = f"what you sent me: {self.headers['Authorization']}"
                if isinstance(fail, int):
                    return self.send(
                        fail,
                        json.dumps({"error": {"message": echo}}),
                        {"Retry-After": outer.after} if outer.after and fail in (429, 503) else {},
                    )
                text = json.dumps(outer.answer(body, echo))
                self.send(
                    200,
                    text[: len(text) // 2]
                    if fail == "torn"
                    else fail
                    if isinstance(fail, str) and fail != "slow"
                    else text,
                )

            def send(self, status, text, more=()):
                raw = text.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **dict(more)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(
            target=self.http.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True
        ).start()

    def answer(self, body: dict, echo: str) -> dict:
        "The chat completion for a request: `says`, unless a kind of endpoint knows better."
        return {"choices": [{"message": {"content": self.says}}]}

    @property
    def spec(self) -> str:
        return f"openai:{self.url}#small"


def endpoint(kind: type[Endpoint]):
    "A fixture: an endpoint of this kind, for one test."

    @pytest.fixture
    def server():
        one = kind()
        yield one
        one.http.shutdown()
        one.http.server_close()

    return server
