# lorax serve on a CPU: docker build -t lorax . && docker run -p 8000:8000 -v models:/models lorax sentence-transformers/all-MiniLM-L6-v2
# docs/deploying.md says more. The wheels are built from this repository; nothing of it but them gets into the image.

FROM python:3.11-slim AS build

WORKDIR /src
COPY core core
COPY lorax_bert lorax_bert
COPY lorax_gpt2 lorax_gpt2
COPY lorax_neox lorax_neox
COPY lorax_qwen2 lorax_qwen2
COPY lorax_roberta lorax_roberta
COPY constraints.txt LICENSE ./
# Wheels of torch for CUDA are several gigabytes; this index has those for a CPU alone.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /usr/local/lib/lorax \
    && /usr/local/lib/lorax/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch \
    && /usr/local/lib/lorax/bin/pip install --no-cache-dir --constraint constraints.txt \
        "./core[server,structured]" ./lorax_bert ./lorax_gpt2 ./lorax_neox ./lorax_qwen2 ./lorax_roberta

FROM python:3.11-slim

# Native kernels are compiled when a model is first loaded, for the processor that is there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --home-dir /models lorax \
    && install --directory --owner lorax /models
COPY --from=build /usr/local/lib/lorax /usr/local/lib/lorax

USER 10001:10001
WORKDIR /models
# Models from the hub, adapters and compiled kernels; a volume keeps them.
ENV PATH=/usr/local/lib/lorax/bin:$PATH HF_HOME=/models/hub LORAX_CACHE=/models/lorax PYTHONUNBUFFERED=1
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as http; http.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["lorax", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
