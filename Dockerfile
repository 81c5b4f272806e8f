# An image for Ray clusters: KubeRay (docs/nightly-rayjob.yaml), or nodes that `ray job submit` sends jobs to.
#
#   docker build --build-arg COMMIT="$(git describe --always --dirty)" -t registry.example.com/awaker-batch:latest .
#
# Driver, head and workers run the same image: Ray wants one version of Python and of itself everywhere. torch is the build
# that pip takes for Linux, with CUDA; the nodes' GPUs need a driver for it, and the image needs no CUDA of its own.
FROM python:3.11-slim

# KubeRay's probes ask the raylet with wget; triton compiles a launcher with gcc when a kernel is first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*

# Jobs are started here: `python jobs/nightly.py --config configs/nightly.yaml ...`.
WORKDIR /srv/awaker-batch

# The dependencies first, in a layer that changes with them alone: of the package only its version is needed for that.
COPY pyproject.toml constraints.txt setup.py README.md LICENSE ./
COPY pipeline/__init__.py pipeline/__init__.py
RUN pip install --no-cache-dir -c constraints.txt . && rm -rf build

COPY configs/ configs/
COPY jobs/ jobs/
COPY pipeline/ pipeline/
# What a manifest says of the code; there is no git in the image.
ARG COMMIT=
RUN if [ -n "$COMMIT" ]; then echo "$COMMIT" > pipeline/COMMIT; fi \
    && pip install --no-cache-dir --no-deps --force-reinstall . \
    && rm -rf build

# A checkpoint from the Hub or a bucket is copied here, once a node: a volume keeps it.
ENV AWAKER_CACHE=/var/cache/awaker-batch \
    PYTHONUNBUFFERED=1
RUN useradd --create-home ray && mkdir -p "$AWAKER_CACHE" && chown ray "$AWAKER_CACHE" /srv/awaker-batch
USER ray

CMD ["awaker-batch", "--help"]
