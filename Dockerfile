# Both ends in one image: culvert (the entry point) and culvert-cloudproxy.
# docs/running.md says how to run them.
#
#   docker build --build-arg VERSION="$(git describe --tags --always)" -t culvert .

FROM --platform=$BUILDPLATFORM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=unknown
ARG TARGETOS
ARG TARGETARCH
RUN GOOS=$TARGETOS GOARCH=$TARGETARCH OUT=/out VERSION=$VERSION ./scripts/build.sh
# Capture needs CAP_NET_RAW, and a user who is not root gets what a container is granted only by
# a file capability: Kubernetes and Docker have no ambient ones. Without the effective bit (+p, not +ep), so
# that the program also starts where it is not granted; it raises the capability itself.
RUN apt-get update && apt-get install -y --no-install-recommends libcap2-bin && rm -rf /var/lib/apt/lists/*
RUN setcap cap_net_raw+p /out/culvert
# The folder of the control socket, writable by the user below.
RUN mkdir -p /root-of-image/run/culvert && chmod 0700 /root-of-image/run/culvert

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chown=65532:65532 /root-of-image/ /
# Without --chown, which would take the file capability away.
COPY --from=build /out/culvert /out/culvert-cloudproxy /out/culvert-pac /usr/bin/
# A number, not a name: there is no /etc/passwd here, and Kubernetes can tell that it is not root.
USER 65532:65532
ENV PATH=/usr/bin
ENTRYPOINT ["/usr/bin/culvert"]
CMD ["run", "-c", "/etc/culvert/culvert.yaml"]
