/* wolfSSL. */
#include <wolfssl/options.h>
#include <wolfssl/ssl.h>
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

static char data[100000], back[sizeof data];
static WOLFSSL *ssl;

static void check(const char *what, int right)
{
    if (right)
        return;
    char words[80];
    fprintf(stderr, "%s: %s\n", what, wolfSSL_ERR_error_string(wolfSSL_get_error(ssl, 0), words));
    exit(1);
}

static void write_all(void)
{
    check("write", wolfSSL_write(ssl, data, sizeof data) == sizeof data);
}

static void read_all(void)
{
    memset(back, 0, sizeof back);
    for (size_t got = 0; got < sizeof back;) {
        int some = wolfSSL_read(ssl, back + got, sizeof back - got);
        check("read", some > 0);
        got += some;
    }
    check("other data came back", memcmp(back, data, sizeof data) == 0);
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {.tv_sec = 20};
    int tcp = socket(AF_INET, SOCK_STREAM, 0);

    if (argc != 4)
        return 2;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = i % 251;
    wolfSSL_Init();
    WOLFSSL_CTX *context = wolfSSL_CTX_new(strcmp(argv[3], "1.3") == 0 ? wolfTLSv1_3_client_method()
                                                                       : wolfTLSv1_2_client_method());
    wolfSSL_CTX_set_verify(context, WOLFSSL_VERIFY_PEER, NULL);
    check("roots", wolfSSL_CTX_load_verify_locations(context, argv[2], NULL) == WOLFSSL_SUCCESS);
    address.sin_port = htons(atoi(argv[1]));
    setsockopt(tcp, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(tcp, (struct sockaddr *)&address, sizeof address) != 0) {
        perror("connect");
        return 1;
    }
    ssl = wolfSSL_new(context);
    wolfSSL_set_fd(ssl, tcp);
#if LIBWOLFSSL_VERSION_HEX < 0x05006000
    /* No tickets: it refuses those of rustls, as it takes nonces of up to 8 bytes only. */
    wolfSSL_no_dhe_psk(ssl);
#endif
    check("name", wolfSSL_UseSNI(ssl, WOLFSSL_SNI_HOST_NAME, "localhost", 9) == WOLFSSL_SUCCESS);
    check("name", wolfSSL_check_domain_name(ssl, "localhost") == WOLFSSL_SUCCESS);
    check("handshake", wolfSSL_connect(ssl) == WOLFSSL_SUCCESS);

    write_all();
    read_all();
    write_all();
    check("close_notify", wolfSSL_shutdown(ssl) == WOLFSSL_SHUTDOWN_NOT_DONE);
    read_all();
    check("the end", wolfSSL_read(ssl, back, 1) == 0 && wolfSSL_get_error(ssl, 0) == WOLFSSL_ERROR_ZERO_RETURN);
    return 0;
}
