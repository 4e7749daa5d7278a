"""A black box behind HTTP, and how it is recovered through faults: python examples/black_box_over_http.py

The service here runs on this machine and is unreliable on purpose: it resets connections, answers 503, and is slow.
"""

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

import distrecon
from distrecon.expand_cluster import network, synthetic_teacher

Rows = list[list[float]]


def ask(url: str, inputs_QI: torch.Tensor) -> Rows:
    """Posts queries [Q, I] as JSON, gets answers [Q, O]; anything but an answer is an exception, and asked again."""
    request = urllib.request.Request(url, json.dumps(inputs_QI.tolist()).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


class FaultyService:
    """An HTTP service on 127.0.0.1 that answers rows by a function, and every 20th request by a fault."""

    def __init__(self, answer: Callable[[Rows], Rows]) -> None:
        self.requests = self.faults = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                service.requests += 1
                rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if service.requests % 20 == 0:
                    service.faults += 1
                    kind = service.faults % 3
                    if kind == 0:
                        return self.connection.close()
                    if kind == 1:
                        return self.send_error(503)
                    time.sleep(0.2)
                body = json.dumps(answer(rows)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


if __name__ == "__main__":
    teacher = network(synthetic_teacher(inputs=4, width=3, activation="tanh", seed=1), "tanh")
    service = FaultyService(lambda rows: teacher(torch.tensor(rows, dtype=torch.float64)).tolist())
    box = partial(ask, service.url)
    result = distrecon.recover_network(box, input_size=4, activation="tanh", max_rows=1000, retries=5)
    print(result.report())
    print(f"faults       {service.faults} of {service.requests} requests")
    assert result.verified
    assert service.faults
