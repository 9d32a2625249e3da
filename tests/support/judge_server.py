"""A server that speaks the OpenAI chat protocol and fails as it is told: `python judge_server.py LOG`.

It answers RIGHT or WRONG by whether the proposed answer is among the reference answers. A question's words script its
failures: "fails N" (500 the first N times), "limited" (429 once, with Retry-After), "slow" (no answer in time), "html"
(a page), "broken" (half a JSON), "empty" (no choices), "mumbles" (a reply without a verdict), "long" (400), "both", and
those of `hostile`; "echoes" repeats the address and the key that it was asked with.
Asked for a label, it gives one with a picture in it, or mumbles.
It prints its port and appends each request's question to LOG.
"""

import json
import re
import sys
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SEEN, LOCK = Counter(), threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""

    def send(self, status: int, body: str, kind: str = "application/json", **headers: str) -> None:
        data = body.encode()
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(data))} | headers
        for name, value in sent.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def error(self, status: int, message: str, **headers: str) -> None:
        self.send(status, json.dumps({"error": {"message": message, "type": "scripted"}}), **headers)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][0]["content"]
        if "LABEL" in text:
            self.send(200, json.dumps(self.said(label(text))))
            return
        question = re.search(r"^Question: (.*)$", text, re.MULTILINE)[1]
        with LOCK:
            SEEN[question] += 1
            seen = SEEN[question]
            with Path(sys.argv[1]).open("a") as log:
                log.write(question + "\n")
        if self.path.partition("?")[0] != "/v1/chat/completions" or request["model"] != "grader":
            self.error(404, f"no model {request['model']}{self.echo()}")
        elif "echoes" in question and "error" in question:
            self.error(400, self.echo())
        elif (fails := re.search(r"fails (\d+)", question)) and seen <= int(fails[1]):
            self.error(500, "scripted")
        elif "limited" in question and seen == 1:
            self.error(429, "slow down", Retry_After="0.05")
        elif "long" in question:
            self.error(400, "maximum context length")
        elif "html" in question:
            self.send(200, "<html>VERDICT: RIGHT</html>", "text/html")
        elif "broken" in question:
            self.send(200, '{"choices": [{"message": {"content": "VERDICT: RIGHT')
        elif any(word in question for word in ("drip", "huge", "swell", "nested", "packed", "elsewhere")):
            self.hostile(question)
        elif "empty" in question:
            self.send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": []}))
        else:
            if "slow" in question:
                time.sleep(2)
            self.send(200, json.dumps(self.completion(text, question)))

    def echo(self) -> str:
        return f" {self.headers['Authorization']} {self.path} "

    def hostile(self, question: str) -> None:
        """A reply byte by byte, one of a gigabyte, one that unpacks to a gigabyte, lists in lists, one elsewhere."""
        try:
            if "nested" in question:
                self.send(200, "[" * 100_000)
            elif "packed" in question:
                self.send(200, "not zipped", Content_Encoding="gzip")
            elif "elsewhere" in question:
                self.send(307, "", Location=self.path)
            elif "swell" in question:
                self.start(200, Content_Encoding="gzip")
                pack = zlib.compressobj(wbits=31)
                for _ in range(1024):
                    self.wfile.write(pack.compress(b" " * 2**20))
            elif "huge" in question:
                self.start(500 if "error" in question else 200)
                for _ in range(1024):
                    self.wfile.write(b" " * 2**20)
            else:
                if "headers" not in question:
                    self.start(200)
                else:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(600):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
        except OSError:
            pass  # it was left

    def start(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def completion(self, text: str, question: str) -> dict:
        answers = json.loads(re.search(r"^Reference answers: (.*)$", text, re.MULTILINE)[1])
        proposed = json.loads(re.search(r"^Proposed answer: (.*)$", text, re.MULTILINE)[1])
        reply = f"<think>VERDICT: WRONG?</think>\nVERDICT: {'RIGHT' if proposed in answers else 'WRONG'}"
        if "half" in question:
            reply = "\ud800\nVERDICT: RIGHT"
        if "rambles" in question:
            reply = "VERDICT" + "*" * 10**6 + "\n" + "<think>" * 10**5
        if "echoes" in question:
            reply = f"{self.echo()}\n{reply}"
        if "mumbles" in question:
            reply = f"It is not RIGHT, but it is hardly WRONG either.{self.echo() if 'echoes' in question else ''}"
        if "both" in question:
            reply = "VERDICT: WRONG\nVERDICT: RIGHT"
        return self.said(reply)

    def said(self, reply: str) -> dict:
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "grader", "choices": [choice]}


def label(text: str) -> str:
    """What is said of an expert: its first token in an image that would load, or a mumble for every third."""
    token = re.search("«(.*?)»", text)[1]
    if len(text) % 3 == 0:
        return "It may be many things."
    return f"Seen.\nLABEL: <img src=x onerror=alert(1)> {token[:20]}"


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
