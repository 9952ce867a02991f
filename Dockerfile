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
# The folder of the control socket, writable by the user below.
RUN mkdir -p /root-of-image/run/culvert && chmod 0700 /root-of-image/run/culvert

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chown=65532:65532 /root-of-image/ /
COPY --from=build /out/culvert /out/culvert-cloudproxy /out/culvert-pac /usr/bin/
# A number, not a name: there is no /etc/passwd here, and Kubernetes can tell that it is not root.
USER 65532:65532
ENV PATH=/usr/bin
ENTRYPOINT ["/usr/bin/culvert"]
CMD ["run", "-c", "/etc/culvert/culvert.yaml"]
