from .agreeing import trace_agreement as trace_agreement
from .formats import read_requests as read_requests
from .request import Request as Request
from .traced import TracedModel as TracedModel
from .traced import TraceRun as TraceRun
