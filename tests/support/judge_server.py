"""A server that speaks the OpenAI chat protocol and fails as it is told: `python judge_server.py LOG`.

It answers RIGHT or WRONG by whether the proposed answer is among the reference answers. A question's words script its
failures: "fails N" (500 the first N times), "limited" (429 once, with Retry-After), "slow" (no answer in time), "html"
(a page), "broken" (half a JSON), "empty" (no choices), "mumbles" (a reply without a verdict), "long" (400), "both".
It prints its port and appends each request's question to LOG.
"""

import json
import re
import sys
import threading
import time
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
        question = re.search(r"^Question: (.*)$", text, re.MULTILINE)[1]
        with LOCK:
            SEEN[question] += 1
            seen = SEEN[question]
            with Path(sys.argv[1]).open("a") as log:
                log.write(question + "\n")
        if self.path != "/v1/chat/completions" or request["model"] != "grader":
            self.error(404, f"no model {request['model']}")
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
        elif "empty" in question:
            self.send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": []}))
        else:
            if "slow" in question:
                time.sleep(2)
            self.send(200, json.dumps(self.completion(text, question)))

    def completion(self, text: str, question: str) -> dict:
        answers = json.loads(re.search(r"^Reference answers: (.*)$", text, re.MULTILINE)[1])
        proposed = json.loads(re.search(r"^Proposed answer: (.*)$", text, re.MULTILINE)[1])
        reply = f"<think>VERDICT: WRONG?</think>\nVERDICT: {'RIGHT' if proposed in answers else 'WRONG'}"
        if "mumbles" in question:
            reply = "It is not RIGHT, but it is hardly WRONG either."
        if "both" in question:
            reply = "VERDICT: WRONG\nVERDICT: RIGHT"
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "grader", "choices": [choice]}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
