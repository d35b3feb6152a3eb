"""Where norms go: sinks for `attach(..., sinks=[...], log_every=50)`."""

from tamegrad.integrations.csv_sink import CsvSink
from tamegrad.integrations.json_lines_sink import JsonLinesSink
from tamegrad.integrations.logging_sink import LoggingSink
from tamegrad.integrations.tensorboard_sink import TensorBoardSink

__all__ = ["CsvSink", "JsonLinesSink", "LoggingSink", "TensorBoardSink"]
