"""A Kaggle of one's own on the loopback interface: keeps what the real client sends, answers what a test says."""

import json
import os
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CLIENT = Path(sysconfig.get_path("scripts"), "kaggle")
ACCOUNT = "somebody"


class LoopbackKaggle:
    """Use as a context; `answers` holds (status, body) by the last part of a request's path."""

    def __init__(self):
        self.requests = []
        self.answers = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home, *, logged_in=True):
        """Variables under which the client talks to this server alone, with nothing of this machine's home."""
        kept = {
            name: value for name, value in os.environ.items() if not name.upper().startswith(("KAGGLE", "NO_PROXY"))
        }
        places = {name: str(home) for name in ("HOME", "KAGGLE_CONFIG_DIR", "TMPDIR")}
        account = {"KAGGLE_USERNAME": ACCOUNT, "KAGGLE_KEY": "not a key"} if logged_in else {}
        proxy = {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": self.address}
        return {**kept, **places, **account, **proxy, "OMP_NUM_THREADS": "1"}

    def sent(self, name):
        """Bodies of the requests whose path ends so, in order."""
        return [body for path, body in self.requests if path == name]

    def _handler(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                name = self.path.rpartition("/")[2]
                is_json = self.headers.get("Content-Type", "").startswith("application/json")
                owner.requests.append((name, json.loads(body) if is_json else body))
                status, answer = owner.answers.get(name, (200, {}))
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_PUT = do_GET = do_POST

            def log_message(self, *_):
                pass

        return Handler
