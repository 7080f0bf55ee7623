# Part of scripts/brokers, which sets $here and $cache, and reads the port.
# shellcheck shell=bash disable=SC2034,SC2154
#
# RabbitMQ 4 and its Erlang, from Debian 13's packages, in a root folder of their own: what Debian 12 and Ubuntu ship
# is out of support. It needs no privilege where user name spaces are allowed.

rabbitmq_suite=trixie
rabbitmq_port=${TIDINGS_TEST_RABBITMQ_PORT:-17672}
rabbitmq_stream_port=${TIDINGS_TEST_RABBITMQ_STREAM_PORT:-17552}
rabbitmq_dist_port=${TIDINGS_TEST_RABBITMQ_DIST_PORT:-17673}
rabbitmq_epmd_port=${TIDINGS_TEST_RABBITMQ_EPMD_PORT:-17369}

rabbitmq_url() { echo "amqp://guest:guest@127.0.0.1:$1"; }
rabbitmq_home() { echo "$cache/rabbitmq-$rabbitmq_suite-$(uname -m)"; }

rabbitmq_running_version() {
  local folders=("$(rabbitmq_home)"/usr/lib/rabbitmq/lib/rabbitmq_server-*)
  echo "${folders[0]##*-}"
}

# The machine's own mirror of Debian; Ubuntu's do not carry it.
debian_mirror() {
  local mirror=${TIDINGS_TEST_DEBIAN_MIRROR:-}
  # shellcheck disable=SC2016  # apt's own placeholder
  [[ -n $mirror ]] || mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    grep -m1 -E '^https?://.*/debian/?$' || true)
  mirror=${mirror:-http://deb.debian.org/debian}
  echo "${mirror%/}"
}

# The keys of Debian 13, which the keyring of an older Debian or of Ubuntu may lack.
debian_keyring() {
  local deb=debian-archive-keyring_2025.1_all.deb
  local sum=9ea7778e443144ca490668737a8ab22dd3e748bb99e805e22ec055abeb3c7fac
  local url=$1/pool/main/d/debian-archive-keyring/$deb
  if /usr/lib/apt/apt-helper -qq -o APT::Sandbox::User=root download-file "$url" "$deb" "SHA256:$sum" >&2; then
    dpkg-deb -x "$deb" keyring
    find "$PWD/keyring/usr/share/keyrings" -name 'debian-archive-keyring.*' | head -n 1
  else
    find /usr/share/keyrings -name 'debian-archive-keyring.*' | head -n 1
  fi
}

# An apt that knows one suite and believes that nothing is installed; proxies and the like are still the machine's own.
private_apt() {
  local mirror keyring
  mirror=$(debian_mirror)
  keyring=$(debian_keyring "$mirror")
  [[ -n $keyring ]] || die "Debian's keys are missing: apt-get install debian-archive-keyring"
  mkdir -p apt/lists/partial apt/archives/partial
  : >apt/status
  echo "deb [arch=$(dpkg --print-architecture) target=Packages signed-by=$keyring] $mirror $rabbitmq_suite main" \
    >apt/sources
  cat >apt/conf <<-END
	#clear APT::Update;
	#clear DPkg;
	APT::Sandbox::User "root";
	APT::Update::Error-Mode "any";
	APT::Default-Release "";
	APT::Install-Recommends "false";
	Acquire::Languages "none";
	Dir::State "$PWD/apt";
	Dir::State::status "$PWD/apt/status";
	Dir::Cache "$PWD/apt";
	Dir::Etc::SourceList "$PWD/apt/sources";
	Dir::Etc::SourceParts "/dev/null";
	Dir::Etc::Preferences "/dev/null";
	Dir::Etc::PreferencesParts "/dev/null";
	END
}

# apt checks the signature of the suite and the sum of every package.
rabbitmq_install() {
  local deb
  command -v apt-get dpkg-deb >/dev/null || die "RabbitMQ comes by apt: use Debian, Ubuntu or compose.yaml"
  rabbitmq_name_spaces >/dev/null
  private_apt
  apt-get -qq -c apt/conf update >&2
  apt-get -qq -c apt/conf install --yes --download-only rabbitmq-server base-files coreutils dash grep libc-bin sed >&2
  mkdir out
  for deb in apt/archives/*.deb; do dpkg-deb -x "$deb" out; done
  touch out/etc/hosts
}

# Without root, a user name space makes one.
rabbitmq_name_spaces() {
  local spaces=(--mount --pid --fork --kill-child)
  ((UID == 0)) || spaces+=(--user --map-root-user)
  unshare "${spaces[@]}" true 2>/dev/null ||
    die "RabbitMQ runs in name spaces of its own, which this machine refuses: be root, or set TIDINGS_TEST_RABBITMQ_URL"
  echo "${spaces[@]}"
}

rabbitmq_configure() {
  cat >rabbitmq.conf <<-END
	listeners.tcp.local = 127.0.0.1:$port
	stream.listeners.tcp.1 = 127.0.0.1:$rabbitmq_stream_port
	vm_memory_high_watermark.absolute = 1GB
	disk_free_limit.absolute = 50MB
	END
  # What a test wants beside it.
  [[ ! -e extra.conf ]] || cat extra.conf >>rabbitmq.conf
  echo '[rabbitmq_auth_mechanism_ssl,rabbitmq_consistent_hash_exchange,rabbitmq_stream].' >enabled_plugins
  echo '127.0.0.1 localhost' >hosts
}

# rabbitmq_tool PID COMMAND...: where the server is, in its name spaces.
rabbitmq_tool() {
  local spaces=(--mount --pid)
  ((UID == 0)) || spaces+=(--user)
  nsenter --target "$1" "${spaces[@]}" env -i PATH=/usr/sbin:/usr/bin HOME=/var/lib/rabbitmq LANG=C.UTF-8 \
    RABBITMQ_NODENAME=tidings@localhost ERL_EPMD_PORT="$rabbitmq_epmd_port" \
    RABBITMQ_ENABLED_PLUGINS_FILE=/var/lib/rabbitmq/enabled_plugins \
    chroot "$(rabbitmq_home)" "/usr/lib/rabbitmq/bin/$2" "${@:3}"
}

rabbitmq_start() {
  local spaces
  spaces=$(rabbitmq_name_spaces)
  rabbitmq_configure
  rm -f beam.pid
  # shellcheck disable=SC2086  # several words
  launch env ROOT="$(rabbitmq_home)" RABBITMQ_DIST_PORT="$rabbitmq_dist_port" ERL_EPMD_PORT="$rabbitmq_epmd_port" \
    unshare $spaces bash "$here/brokers.d/rabbitmq.chroot"
  # Not unshare but what it runs is the server.
  within 10 test -s beam.pid || fail_start rabbitmq "did not start"
  record "$(<beam.pid)"
}
