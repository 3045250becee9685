import java.io.FileInputStream;
import java.net.Socket;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import java.util.Arrays;
import java.util.Random;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/** Java's SSLSocket. */
public class Client {
    public static void main(String[] arguments) throws Exception {
        var roots = KeyStore.getInstance(KeyStore.getDefaultType());
        roots.load(null);
        try (var file = new FileInputStream(arguments[1])) {
            roots.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(file));
        }
        var trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(roots);
        var context = SSLContext.getInstance("TLS");
        context.init(null, trust.getTrustManagers(), null);

        var tcp = new Socket("127.0.0.1", Integer.parseInt(arguments[0]));
        tcp.setSoTimeout(20_000);
        var tls = (SSLSocket) context.getSocketFactory().createSocket(tcp, "localhost", tcp.getPort(), true);
        var parameters = tls.getSSLParameters();
        parameters.setProtocols(new String[] {"TLSv" + arguments[2]});
        parameters.setEndpointIdentificationAlgorithm("HTTPS");
        tls.setSSLParameters(parameters);

        var data = new byte[100_000];
        new Random(1).nextBytes(data);
        tls.getOutputStream().write(data);
        check(tls.getInputStream().readNBytes(data.length), data);
        tls.getOutputStream().write(data);
        tls.shutdownOutput();
        // An end without close_notify is an SSLException.
        check(tls.getInputStream().readAllBytes(), data);
        tls.close();
    }

    static void check(byte[] received, byte[] sent) {
        if (!Arrays.equals(received, sent)) {
            throw new AssertionError("other data came back: " + received.length + " bytes");
        }
    }
}
