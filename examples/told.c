/* Tells of every loss in one file of a daxemu mount, until its device is removed.
 * told DEVICE/control.sock FILE
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	struct stat file;
	char *line = NULL;
	size_t room = 0;

	if (argc != 3 || strlen(argv[1]) >= sizeof(at.sun_path)) {
		fprintf(stderr, "told DEVICE/control.sock FILE\n");
		return 2;
	}
	strcpy(at.sun_path, argv[1]);
	if (stat(argv[2], &file)) {
		perror(argv[2]);
		return 1;
	}
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	FILE *control = fd < 0 ? NULL : fdopen(fd, "r");
	if (!control || connect(fd, (struct sockaddr *)&at, sizeof(at))) {
		perror(argv[1]);
		return 1;
	}
	dprintf(fd,
		"{\"op\": \"follow\", \"events\": [\"FileDamaged\", \"StoreLost\", \"DeviceRemoved\"],"
		" \"files\": [{\"ino\": %llu}]}\n",
		(unsigned long long)file.st_ino);
	while (getline(&line, &room, control) > 0) {
		if (strstr(line, "\"event\":\"DeviceRemoved\""))
			break;
		printf("lost: %s", line);
		fflush(stdout);
	}
	free(line);
	fclose(control);
	return 0;
}
