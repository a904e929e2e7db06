/* Java on a direct mount: MappedByteBuffer, four threads, READ_WRITE_SYNC (MAP_SYNC). Prints three lines. */
import java.nio.ByteBuffer;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.channels.FileChannel.MapMode;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import jdk.nio.mapmode.ExtendedMapMode;

public class MapFile {
    static final int SIZE = 1 << 20;

    public static void main(String[] arguments) throws Exception {
        try (FileChannel file = FileChannel.open(Path.of(arguments[0]), StandardOpenOption.CREATE,
                StandardOpenOption.READ, StandardOpenOption.WRITE)) {
            MappedByteBuffer map = file.map(MapMode.READ_WRITE, 0, SIZE);
            map.put(5000, (byte) 'j');
            ByteBuffer one = ByteBuffer.allocate(1);
            file.read(one, 5000);
            System.out.println("read " + (char) one.get(0));
            MappedByteBuffer copy = file.map(MapMode.PRIVATE, 0, SIZE);
            copy.put(5000, (byte) 'p');
            System.out.println("shared " + (char) map.get(5000));
            Thread[] threads = new Thread[4];
            for (int i = 0; i < threads.length; i++) {
                int first = i;
                threads[i] = new Thread(() -> {
                    for (int at = first; at < SIZE; at += 4)
                        map.put(at, (byte) ('a' + first));
                });
                threads[i].start();
            }
            for (Thread thread : threads)
                thread.join();
            map.force();
            for (int at = 0; at < SIZE; at++)
                if (map.get(at) != (byte) ('a' + at % 4))
                    throw new Exception("at " + at);
            MappedByteBuffer sync = file.map(ExtendedMapMode.READ_WRITE_SYNC, 0, SIZE);
            sync.put(6000, (byte) 's');
            sync.force();
            System.out.println("sync " + (char) map.get(6000));
        }
    }
}
