# One image for all steps, on a cluster or by hand. Whoever starts it may be any user, one without a name too, and its root
# may be read-only: what is written goes below /tmp. How to build it, the CPU variant, sizes, what was tried: docs/image.md.
#
# No layer holds a credential, the name of an index or a compiler: what the build needs stays in its stage.

# Name it by digest where a build must give the same image next year: --build-arg BASE=python:3.11-slim@sha256:...
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Where torch and torchvision come from; empty: from where all else comes from, which means a build for CUDA. PyTorch's index
# of CPU wheels makes the CPU variant, of the same versions.
ARG TORCH_INDEX=""
# A mirror in place of pip's own index (one without a password, see docs/image.md).
ARG PIP_INDEX_URL
# The constraints twice: newer pips take the second for what builds a package, older ones know the first alone.
ENV PIP_CONSTRAINT=/build/constraints.txt \
    PIP_BUILD_CONSTRAINT=/build/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# Without pip: nothing is installed once the image is built.
RUN python3 -m venv --without-pip /opt/venv
COPY constraints.txt pyproject.toml ./
# What the two need comes with all the rest: an index of theirs has it in other versions.
RUN pip --python /opt/venv/bin/python3 install --no-compile --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
# Of kfp the executor alone runs here, and that needs none of the packages that kfp wants elsewhere.
RUN python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"]["image"], sep="\n")' > requirements.txt \
    && pip --python /opt/venv/bin/python3 install --no-compile --requirement requirements.txt \
    && pip --python /opt/venv/bin/python3 install --no-compile --no-deps kfp

# Half a gigabyte that nobody loads: libraries of Triton's own profiler, a solver for several GPUs in one process, and
# NVIDIA's run-time compiler a second time.
RUN cd /opt/venv/lib/python3*/site-packages \
    && rm -rf triton/backends/nvidia/lib/cupti* nvidia/*/lib/libcusolverMg.so.* nvidia/*/lib/libnvrtc*.alt.so.*

# Triton compiles its driver when the first kernel runs, and there is no compiler then (docker/cc). So it does that here,
# against a stub of NVIDIA's library, which comes with a GPU; one function makes the linker note its name, all are found
# when they are called. torch's CPU build has no Triton.
COPY docker/cc /opt/triton-driver/cc
RUN driver=$(echo /opt/venv/lib/python3*/site-packages/triton/backends/nvidia/driver.c); [ ! -f "$driver" ] || { \
        apt-get update -q && apt-get install -qy --no-install-recommends gcc libc6-dev \
        && mkdir stub && echo 'void cuGetErrorString(void) {}' | gcc -shared -x c - -o stub/libcuda.so.1 -Wl,-soname,libcuda.so.1 \
        && TRITON_LIBCUDA_PATH=$PWD/stub LD_LIBRARY_PATH=$PWD/stub TRITON_CACHE_DIR=$PWD/triton /opt/venv/bin/python3 -c \
            'import os, sys; sys.setdlopenflags(os.RTLD_LAZY); from triton.backends.nvidia.driver import CudaUtils; CudaUtils()' \
        && cp triton/*/cuda_utils*.so /opt/triton-driver/driver.so \
        && readelf -d /opt/triton-driver/driver.so | grep -q 'NEEDED.*libcuda.so.1' \
        && cp "$driver" /opt/triton-driver/driver.c; }

# The embedded data, checked by their hashes. (DVC would look for git.)
COPY .dvc/config .dvc/
COPY .dvc/bundled .dvc/bundled
COPY data.dvc ./
RUN /opt/venv/bin/dvc config core.no_scm true && /opt/venv/bin/dvc pull --quiet --remote bundled data.dvc

COPY LICENSE NOTICE README.md constraints.txt data.dvc dvc.yaml params.yaml pyproject.toml /opt/vapi/
COPY data/README.md /opt/vapi/data/
COPY data/geneval /opt/vapi/data/geneval
COPY mlflow/generator.py /opt/vapi/mlflow/
COPY docker/gitconfig /opt/gitconfig
COPY vapi /opt/vapi/vapi
# Bytecode is written now, since nobody can later. Ours is compared with its source, over which somebody may mount a change;
# that of packages is believed (some hold files for other versions of Python, which do not compile). And whatever
# permissions the clone has, everybody may read.
RUN cp -r data/. /opt/vapi/data/ \
    && pip --python /opt/venv/bin/python3 install --no-deps --no-build-isolation --editable /opt/vapi \
    && /opt/venv/bin/python3 -m compileall -q -j 0 --invalidation-mode checked-hash /opt/vapi \
    && { /opt/venv/bin/python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || true; } \
    && chmod -R a+rX /opt/gitconfig /opt/triton-driver /opt/vapi /opt/venv
# What torch brings becomes a layer of its own: a node fetches layers side by side.
RUN cd /opt/venv/lib/python3*/site-packages && mkdir -p "/opt/torch${PWD#/opt/venv}" \
    && for name in nvidia torch triton; do [ ! -d $name ] || mv $name "/opt/torch${PWD#/opt/venv}/"; done

FROM ${BASE}
COPY --from=build /opt/torch /opt/venv
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/triton-driver /opt/triton-driver
COPY --from=build /opt/vapi /opt/vapi
COPY --from=build /opt/gitconfig /etc/gitconfig
ARG VERSION=0.1.0
# The commit that is built, and where it can be had. (After the layers, which do not depend on them.)
ARG COMMIT=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="vapi" \
      org.opencontainers.image.description="VA-pi: fine-tunes an autoregressive image generator on what its tokens look like once decoded" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Below /tmp, which is the one place (with /dev/shm) that must be writable. Not HF_HOME and TORCH_HOME, which follow
# XDG_CACHE_HOME: a step points them at its volume unless they are set. USER, since not every user has a name.
ENV PATH=/opt/venv/bin:$PATH \
    CC=/opt/triton-driver/cc \
    VAPI_COMMIT="${COMMIT}" \
    USER=vapi \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/.cache \
    CUDA_CACHE_PATH=/tmp/.cache/cuda \
    DVC_SITE_CACHE_DIR=/tmp/.cache/dvc \
    MPLCONFIGDIR=/tmp/.cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/.cache/inductor \
    TRITON_CACHE_DIR=/tmp/.cache/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=true \
    GIT_PYTHON_REFRESH=quiet \
    GX_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /opt/vapi
USER 10001:0
CMD ["vapi", "--help"]
