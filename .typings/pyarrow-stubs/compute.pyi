# Its functions are made at run time, so a type checker can't find them in pyarrow's source.
from typing import Any

def __getattr__(name: str) -> Any: ...
