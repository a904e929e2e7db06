# docker build -t daxemu . ; docker run --rm --device /dev/fuse --cap-add SYS_ADMIN --shm-size 1g daxemu demo
FROM debian:12 AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
    gcc libc6-dev libfuse3-dev pkg-config python3 python3-dev python3-venv
COPY . /src
RUN python3 -m venv /opt/daxemu && /opt/daxemu/bin/pip install --no-cache-dir -c /src/constraints.txt /src pytest

FROM debian:12
# gcc and sqlite3 are for the demo.
RUN apt-get update && apt-get install -y --no-install-recommends fuse3 gcc libc6-dev python3 sqlite3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/daxemu /opt/daxemu
ENV PATH=/opt/daxemu/bin:$PATH
ENTRYPOINT ["daxemu"]
