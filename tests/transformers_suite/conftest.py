"""The test file here belongs into a checkout of transformers, beside that library's own;

`run.py` takes it there.
"""

collect_ignore = ["test_modeling_qwen3_encdec.py"]
