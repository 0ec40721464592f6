"""A real S3 server on this machine, moto's, with an empty bucket."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "bucket"
VARIABLES = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_variables() -> Iterator[dict[str, str]]:
    """Start the server; the variables by which clients find it and their credentials."""
    pytest.importorskip("s3fs", reason="no s3fs: pip install '.[s3]'")
    server_of = pytest.importorskip("moto.server", reason="no moto: pip install 'moto[s3]' flask flask-cors")
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = VARIABLES | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], **keys).create_bucket(Bucket=BUCKET)
    try:
        yield variables
    finally:
        server.stop()
