# docker build --target cpu  -t latentphys:cpu .
# docker build --target cuda -t latentphys:cuda .      (run with --gpus all)
# Data and results live in the mounted folder: docker run --rm --user "$(id -u)" -v "$PWD:/data" latentphys:cpu demo

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY autoencoders autoencoders
COPY routers routers
COPY validators validators
COPY configs configs
COPY latentphys latentphys
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS cpu
# EGL with Mesa: VTK draws without a screen.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*
# Arguments for pip, such as the index that holds the CPU build of torch.
ARG PIP_ARGS=""
COPY requirements /tmp/requirements
RUN pip install --no-cache-dir ${PIP_ARGS} --requirement /tmp/requirements/cpu-py311.txt \
    && pip install --no-cache-dir ${PIP_ARGS} --no-deps --requirement /tmp/requirements/no-deps.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && rm -rf /tmp/wheels /tmp/requirements \
    && useradd --create-home --uid 1000 latentphys \
    && install --directory --owner=latentphys /data
ENV VTK_DEFAULT_OPENGL_WINDOW=vtkEGLRenderWindow \
    MPLBACKEND=Agg \
    PYTHONUNBUFFERED=1
USER latentphys
WORKDIR /data
ENTRYPOINT ["latentphys"]
CMD ["--help"]

# torch's wheels bring the CUDA libraries; g++ and the Python headers are for torch.compile.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda
# `graphics` lets the container use the driver's EGL; Mesa's is the fallback where the driver brings none.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        python3 python3-dev python3-venv g++ libegl1 libegl-mesa0 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/latentphys
ENV PATH=/opt/latentphys/bin:$PATH
ARG PIP_ARGS=""
COPY --from=wheel /wheels /tmp/wheels
RUN wheel="$(ls /tmp/wheels/latentphys-*.whl)" \
    && pip install --no-cache-dir ${PIP_ARGS} "${wheel}[all]" \
    && rm -rf /tmp/wheels \
    && useradd --create-home latentphys \
    && install --directory --owner=latentphys /data
ENV VTK_DEFAULT_OPENGL_WINDOW=vtkEGLRenderWindow \
    MPLBACKEND=Agg \
    PYTHONUNBUFFERED=1
USER latentphys
WORKDIR /data
ENTRYPOINT ["latentphys"]
CMD ["--help"]
