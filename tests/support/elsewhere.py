"""Run alone: a server as nnsight's client expects NDIF to be, of one model, where moe_lens cannot be imported."""

import io
import json
import sys

import torch
import zstandard
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing import tracer as tracing
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler
from transformers import AutoModelForCausalLM, AutoTokenizer

SESSIONS: dict[str, "Subscribed"] = {}


class Subscribed(WebSocketHandler):
    """Who waits for what comes of a request."""

    def open(self) -> None:
        name = str(len(SESSIONS))
        SESSIONS[name] = self
        self.write_message(json.dumps({"session_id": name}))


class Asked(RequestHandler):
    """Runs a request and tells who waits for it."""

    def post(self) -> None:
        asked = RequestModel(**json.loads(self.get_body_argument("data")))
        data = done(self.request.files["blob"][0]["body"], asked.compress)
        completed = ResponseModel(id="0", status=Status.COMPLETED, data=data)
        SESSIONS[asked.session_id].write_message(completed.pickle(), binary=True)
        self.write(ResponseModel(id="0", status=Status.RECEIVED).model_dump_json())


def done(blob: bytes, compress: bool) -> bytes:
    """What a request saves of its run in the model, as bytes."""
    tracer = RequestModel.deserialize(blob, MODEL._remoteable_persistent_objects(), compress=compress)
    tracing.inc()
    try:
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in tracing._saves()}
    finally:
        tracing.dec()
    with io.BytesIO() as file:
        torch.save(saved, file)
        found = file.getvalue()
    return zstandard.ZstdCompressor().compress(found) if compress else found


if __name__ == "__main__":
    sys.modules["moe_lens"] = None  # importing it fails
    [_, folder] = sys.argv
    module = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    MODEL = TransformersModel(module, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    [socket] = bind_sockets(0, "127.0.0.1")
    HTTPServer(Application([("/subscribe", Subscribed), ("/request", Asked)])).add_socket(socket)
    print(socket.getsockname()[1], flush=True)
    IOLoop.current().start()
