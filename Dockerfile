# loraplex in a container: no root, one volume.
#
#   docker build -t loraplex --build-arg TORCH_INDEX=... .
#   docker run --rm -p 127.0.0.1:8000:8000 -v loraplex-data:/data -e LORAPLEX_API_KEY loraplex
#
# The server listens on 0.0.0.0 here and therefore does not start without LORAPLEX_API_KEY.

FROM python:3.12-slim AS build

# Where torch comes from. Empty: pip's own index, whose Linux wheels carry CUDA (some gigabytes). For a CPU image give
# the address of PyTorch's CPU wheels, which its installation page names.
ARG TORCH_INDEX=""

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
# torch in a layer of its own: it is the largest part and changes least. The range is pyproject.toml's.
RUN python -m venv /opt/loraplex \
    && /opt/loraplex/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY adapters adapters
RUN /opt/loraplex/bin/pip install .


FROM python:3.12-slim

LABEL org.opencontainers.image.title="loraplex" \
      org.opencontainers.image.description="An inference server for many LoRA adapters on one frozen base model" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid loraplex --no-create-home --home-dir /data --shell /usr/sbin/nologin loraplex \
    && install -d -o loraplex -g loraplex -m 0750 /data

COPY --from=build /opt/loraplex /opt/loraplex

# /data holds uploads, the registry and the compiled kernels (they are made for the CPU they run on).
ENV PATH=/opt/loraplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_PORT=8000 \
    LORAPLEX_DATA_DIR=/data

USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000

# The first start compiles the kernels.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['LORAPLEX_PORT'] + '/health', timeout=4)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["loraplex"]
CMD ["serve"]
