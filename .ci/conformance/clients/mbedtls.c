/* Mbed TLS, of version 2.28 (TLS 1.2 only) or 3.6. */
#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/error.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/ssl.h>
#include <mbedtls/version.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if MBEDTLS_VERSION_MAJOR >= 3
#include <psa/crypto.h>
#endif

static unsigned char data[100000], back[sizeof data];

static int check(const char *what, int result)
{
    char words[200];
    if (result >= 0)
        return result;
    mbedtls_strerror(result, words, sizeof words);
    fprintf(stderr, "%s: %s\n", what, words);
    exit(1);
}

static void write_all(mbedtls_ssl_context *ssl)
{
    for (size_t sent = 0; sent < sizeof data;)
        sent += check("write", mbedtls_ssl_write(ssl, data + sent, sizeof data - sent));
}

/* Reads up to as much as was sent; returns early with 0 at close_notify. */
static size_t read_some(mbedtls_ssl_context *ssl, unsigned char *into, size_t length)
{
    for (;;) {
        int result = mbedtls_ssl_read(ssl, into, length);
        if (result == MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY)
            return 0;
#ifdef MBEDTLS_ERR_SSL_RECEIVED_NEW_SESSION_TICKET
        if (result == MBEDTLS_ERR_SSL_RECEIVED_NEW_SESSION_TICKET)
            continue;
#endif
        if (result == 0) {
            fprintf(stderr, "the end without close_notify\n");
            exit(1);
        }
        return check("read", result);
    }
}

static void read_all(mbedtls_ssl_context *ssl)
{
    memset(back, 0, sizeof back);
    for (size_t got = 0, some; got < sizeof back; got += some)
        if ((some = read_some(ssl, back + got, sizeof back - got)) == 0)
            break;
    if (memcmp(back, data, sizeof data) != 0) {
        fprintf(stderr, "other data came back\n");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    mbedtls_net_context net;
    mbedtls_entropy_context entropy;
    mbedtls_ctr_drbg_context random;
    mbedtls_x509_crt roots;
    mbedtls_ssl_config config;
    mbedtls_ssl_context ssl;
    unsigned char more;

    if (argc != 4)
        return 2;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = i % 251;
    mbedtls_net_init(&net);
    mbedtls_entropy_init(&entropy);
    mbedtls_ctr_drbg_init(&random);
    mbedtls_x509_crt_init(&roots);
    mbedtls_ssl_config_init(&config);
    mbedtls_ssl_init(&ssl);
    check("seed", mbedtls_ctr_drbg_seed(&random, mbedtls_entropy_func, &entropy, NULL, 0));
    check("roots", mbedtls_x509_crt_parse_file(&roots, argv[2]));
    check("defaults", mbedtls_ssl_config_defaults(&config, MBEDTLS_SSL_IS_CLIENT,
                                                  MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT));
    mbedtls_ssl_conf_authmode(&config, MBEDTLS_SSL_VERIFY_REQUIRED);
    mbedtls_ssl_conf_ca_chain(&config, &roots, NULL);
    mbedtls_ssl_conf_rng(&config, mbedtls_ctr_drbg_random, &random);
    mbedtls_ssl_conf_read_timeout(&config, 20000);
#if MBEDTLS_VERSION_MAJOR >= 3
    check("psa", psa_crypto_init());
    mbedtls_ssl_protocol_version version =
        strcmp(argv[3], "1.3") == 0 ? MBEDTLS_SSL_VERSION_TLS1_3 : MBEDTLS_SSL_VERSION_TLS1_2;
    mbedtls_ssl_conf_min_tls_version(&config, version);
    mbedtls_ssl_conf_max_tls_version(&config, version);
#else
    if (strcmp(argv[3], "1.2") != 0) {
        fprintf(stderr, "UNSUPPORTED: %s has no TLS %s\n", MBEDTLS_VERSION_STRING_FULL, argv[3]);
        return 3;
    }
    mbedtls_ssl_conf_min_version(&config, MBEDTLS_SSL_MAJOR_VERSION_3, MBEDTLS_SSL_MINOR_VERSION_3);
    mbedtls_ssl_conf_max_version(&config, MBEDTLS_SSL_MAJOR_VERSION_3, MBEDTLS_SSL_MINOR_VERSION_3);
#endif
    check("connect", mbedtls_net_connect(&net, "127.0.0.1", argv[1], MBEDTLS_NET_PROTO_TCP));
    check("setup", mbedtls_ssl_setup(&ssl, &config));
    check("name", mbedtls_ssl_set_hostname(&ssl, "localhost"));
    mbedtls_ssl_set_bio(&ssl, &net, mbedtls_net_send, mbedtls_net_recv, mbedtls_net_recv_timeout);
    check("handshake", mbedtls_ssl_handshake(&ssl));

    write_all(&ssl);
    read_all(&ssl);
    write_all(&ssl);
    check("close_notify", mbedtls_ssl_close_notify(&ssl));
    read_all(&ssl);
    if (read_some(&ssl, &more, 1) != 0) {
        fprintf(stderr, "more came than was sent\n");
        return 1;
    }
    mbedtls_net_free(&net);
    return 0;
}
