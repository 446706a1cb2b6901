# The server in a container: `docker build -t minimax-m1 .`, then docs/deploy.md.
#
#   PYTHON            minor version of the interpreter
#   TORCH_INDEX_URL   where torch comes from; empty: the default index, whose build is for NVIDIA GPUs too
#   MARCH             what the C++ kernels are compiled for. By default nearly any x86 server (AVX2) runs them; `native`
#                     is for machines like the one that builds, and faster (docs/deploy.md has figures)
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG MARCH=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/minimax-m1
ENV PATH=/opt/minimax-m1/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# torch alone and first: a change of the code does not fetch it anew, and only this step may look at its index
COPY constraints.txt .
RUN pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minimax_m1 minimax_m1
RUN set -eu; \
    case "${MARCH}:$(uname -m)" in \
        :x86_64) march=x86-64-v3 ;; \
        :aarch64) march=armv8-a ;; \
        *) march="${MARCH:-native}" ;; \
    esac; \
    MINIMAX_M1_MARCH="${march}" pip install --constraint constraints.txt .
# kernels that were not built, or not for this machine, would only be slow there: better no image
RUN cd / && python -c "from minimax_m1.kernels import choose; assert choose(None) == 'compiled'"

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="minimax-m1" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin minimax \
    && install --directory --owner=10001 --group=minimax /data
COPY --from=build /opt/minimax-m1 /opt/minimax-m1
# the usage of keys goes to /data/minimax-m1/usage.sqlite
ENV PATH=/opt/minimax-m1/bin:$PATH PYTHONUNBUFFERED=1 XDG_STATE_HOME=/data
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["minimax-m1"]
CMD ["serve", "--host", "0.0.0.0"]
