# Part of scripts/brokers, which sets $here and $cache, and reads the port.
# shellcheck shell=bash disable=SC2034,SC2154
#
# Apache Kafka, one node in KRaft mode, from Maven Central.

kafka_version=4.3.1
kafka_log4j_version=2.25.1
kafka_port=${TIDINGS_TEST_KAFKA_PORT:-17092}
kafka_controller_port=${TIDINGS_TEST_KAFKA_CONTROLLER_PORT:-17093}
kafka_heap=${TIDINGS_TEST_KAFKA_HEAP:-512m}
kafka_jvm=${TIDINGS_TEST_KAFKA_JVM--XX:+UseSerialGC -XX:TieredStopAtLevel=1}

kafka_url() { echo "kafka://127.0.0.1:$1"; }
kafka_home() { echo "$cache/kafka-$kafka_version"; }
kafka_running_version() { echo "$kafka_version"; }

# Maven knows the machine's mirrors; without it, or with a mirror by name, curl fetches the same files.
kafka_install() {
  kafka_java >/dev/null
  mkdir out
  if [[ -z ${TIDINGS_TEST_MAVEN_URL:-} ]] && command -v mvn >/dev/null; then kafka_by_maven; else kafka_by_curl; fi
  awk -F '[ :]+' '{ print $1 "  " $3 "-" $4 ".jar" }' "$here/brokers.d/kafka.jars" >sums
  (cd out && sha256sum --check --quiet --strict ../sums) >&2
}

kafka_dependency() {
  echo "<dependency><groupId>$1</groupId><artifactId>$2</artifactId><version>$3</version></dependency>"
}

kafka_by_maven() {
  cat >pom.xml <<-END
	<project xmlns="http://maven.apache.org/POM/4.0.0">
	  <modelVersion>4.0.0</modelVersion>
	  <groupId>tidings</groupId><artifactId>kafka</artifactId><version>0</version><packaging>pom</packaging>
	  <dependencies>
	    $(kafka_dependency org.apache.kafka kafka_2.13 "$kafka_version")
	    $(kafka_dependency org.apache.logging.log4j log4j-core "$kafka_log4j_version")
	    $(kafka_dependency org.apache.logging.log4j log4j-slf4j-impl "$kafka_log4j_version")
	  </dependencies>
	</project>
	END
  mvn -q -B --strict-checksums dependency:copy-dependencies -DoutputDirectory="$PWD/out" >maven.log 2>&1 ||
    { cat maven.log >&2; return 1; }
}

kafka_by_curl() {
  local base=${TIDINGS_TEST_MAVEN_URL:-https://repo1.maven.org/maven2} group name version
  while IFS=' :' read -r _ group name version; do
    curl --fail --silent --show-error --location --retry 3 --output "out/$name-$version.jar" \
      "${base%/}/${group//.//}/$name/$version/$name-$version.jar"
  done <"$here/brokers.d/kafka.jars"
}

kafka_java() {
  local java=java version
  [[ -z ${JAVA_HOME:-} ]] || java=$JAVA_HOME/bin/java
  version=$("$java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p') || true
  ((${version:-0} >= 17)) || die "Kafka needs Java 17 or newer: apt-get install default-jre-headless, or set JAVA_HOME"
  echo "$java"
}

# More listeners, for proxies: TIDINGS_TEST_KAFKA_PROXIED is PORT:ADVERTISED,.. where ADVERTISED is the proxy's port on this host.
# A client that connects through a proxy is told to stay with that proxy.
kafka_proxied() {
  local pair number=0
  listeners= advertised= protocols=
  for pair in ${TIDINGS_TEST_KAFKA_PROXIED//,/ }; do
    number=$((number + 1))
    listeners+=",PROXIED$number://127.0.0.1:${pair%:*}"
    advertised+=",PROXIED$number://127.0.0.1:${pair#*:}"
    protocols+=",PROXIED$number:PLAINTEXT"
  done
}

# A listener that asks the user `shop` for a password, or a token that nobody signs: TIDINGS_TEST_KAFKA_SASL is PORT:PASSWORD. And one by
# TLS, to which clients show certificates: TIDINGS_TEST_KAFKA_TLS is PORT:FOLDER.
kafka_secured() {
  local name setting
  for name in SASL:SASL_PLAINTEXT TLS:SSL; do
    setting=TIDINGS_TEST_KAFKA_${name%:*}
    [[ -n ${!setting:-} ]] || continue
    listeners+=",${name%:*}://127.0.0.1:${!setting%%:*}"
    advertised+=",${name%:*}://127.0.0.1:${!setting%%:*}"
    protocols+=",$name"
  done
}

kafka_sasl_properties() {
  [[ -n ${TIDINGS_TEST_KAFKA_SASL:-} ]] || return 0
  local modules=org.apache.kafka.common.security
  echo listener.name.sasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER
  echo "listener.name.sasl.scram-sha-256.sasl.jaas.config=$modules.scram.ScramLoginModule required;"
  echo "listener.name.sasl.scram-sha-512.sasl.jaas.config=$modules.scram.ScramLoginModule required;"
  echo 'listener.name.sasl.oauthbearer.sasl.jaas.config=\'
  echo "  $modules.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub=\"broker\";"
  echo 'listener.name.sasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \'
  echo "  user_shop=\"${TIDINGS_TEST_KAFKA_SASL#*:}\";"
}

kafka_tls_properties() {
  [[ -n ${TIDINGS_TEST_KAFKA_TLS:-} ]] || return 0
  local store
  for store in keystore:server truststore:ca; do
    echo "listener.name.tls.ssl.${store%:*}.type=PEM"
    echo "listener.name.tls.ssl.${store%:*}.location=${TIDINGS_TEST_KAFKA_TLS#*:}/${store#*:}.pem"
  done
  echo listener.name.tls.ssl.client.auth=required
}

kafka_configure() {
  local listeners advertised protocols
  TIDINGS_TEST_KAFKA_PROXIED=${TIDINGS_TEST_KAFKA_PROXIED:-} kafka_proxied
  kafka_secured
  cat >log4j2.xml <<-END
	<Configuration status="WARN">
	  <Appenders><Console name="out"><PatternLayout pattern="%d{ISO8601} %p %m (%c)%n"/></Console></Appenders>
	  <Loggers><Root level="INFO"><AppenderRef ref="out"/></Root></Loggers>
	</Configuration>
	END
  cat >server.properties <<-END
	process.roles=broker,controller
	node.id=1
	controller.quorum.voters=1@127.0.0.1:$kafka_controller_port
	controller.listener.names=CONTROLLER
	listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$kafka_controller_port$listeners
	advertised.listeners=PLAINTEXT://127.0.0.1:$port$advertised
	listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT$protocols
	inter.broker.listener.name=PLAINTEXT
	log.dirs=$PWD/data
	auto.create.topics.enable=false

	# One node.
	offsets.topic.replication.factor=1
	offsets.topic.num.partitions=1
	transaction.state.log.replication.factor=1
	transaction.state.log.min.isr=1
	transaction.state.log.num.partitions=1
	share.coordinator.state.topic.replication.factor=1
	share.coordinator.state.topic.min.isr=1
	share.coordinator.state.topic.num.partitions=1

	# A broker that was killed may come back only when its old registration has expired: 3 s instead of 12.
	broker.session.timeout.ms=1500
	broker.heartbeat.interval.ms=300

	# Members that were killed lose their partitions after 6 s instead of 45, or sooner if a client asks for it.
	group.initial.rebalance.delay.ms=0
	group.min.session.timeout.ms=1000
	group.consumer.min.session.timeout.ms=1000
	group.consumer.session.timeout.ms=6000
	group.consumer.min.heartbeat.interval.ms=300
	group.consumer.heartbeat.interval.ms=1000

	# A small heap.
	log.cleaner.dedupe.buffer.size=16777216
	END
  { kafka_sasl_properties; kafka_tls_properties; } >>server.properties
}

kafka_format() {
  local id scram=() hash
  for hash in ${TIDINGS_TEST_KAFKA_SASL:+256 512}; do
    scram+=(--add-scram "SCRAM-SHA-$hash=[name=shop,password=\"${TIDINGS_TEST_KAFKA_SASL#*:}\"]")
  done
  id=$(head -c 16 /dev/urandom | base64 | tr '+/' 'AB')
  "$1" "${options[@]}" -cp "$(kafka_home)/*" -Dlog4j2.configurationFile=log4j2.xml kafka.tools.StorageTool format \
    --cluster-id "${id%==}" --config server.properties "${scram[@]}" >>log 2>&1
}

kafka_start() {
  local java options
  read -ra options <<<"$kafka_jvm"
  java=$(kafka_java)
  kafka_configure
  [[ -e data/meta.properties ]] || kafka_format "$java" || fail_start kafka "could not format its data folder"
  mkdir -p tmp
  launch "$java" "${options[@]}" -Xms128m "-Xmx$kafka_heap" -cp "$(kafka_home)/*" -Djava.io.tmpdir="$PWD/tmp" \
    -Dlog4j2.configurationFile=log4j2.xml kafka.Kafka server.properties
}
