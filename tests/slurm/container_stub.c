/* Stands for pyxis: srun accepts the options of pyxis that the job scripts use, and its tasks see their values as
 * STUB_CONTAINER_IMAGE and so on. No container starts.
 *
 * gcc -shared -fPIC -o container_stub.so container_stub.c   (header: Debian package libslurm-dev) */
#include <slurm/spank.h>
#include <string.h>

SPANK_PLUGIN(container_stub, 1);

enum { IMAGE, NAME, MOUNTS, WORKDIR, ENVIRONMENT, COUNT };

static const char *variables[COUNT] = {
    "STUB_CONTAINER_IMAGE", "STUB_CONTAINER_NAME", "STUB_CONTAINER_MOUNTS", "STUB_CONTAINER_WORKDIR",
    "STUB_CONTAINER_ENV"};
static const char *values[COUNT];

/* Called in srun, and again with the same text in the step's daemon, where the value is wanted. */
static int keep(int which, const char *text, int remote)
{
    (void)remote;
    values[which] = strdup(text); /* the caller's goes away */
    return ESPANK_SUCCESS;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "image", 1, IMAGE, keep},
    {"container-name", "NAME", "name of the unpacked container", 1, NAME, keep},
    {"container-mounts", "LIST", "mounts", 1, MOUNTS, keep},
    {"container-workdir", "FOLDER", "working directory", 1, WORKDIR, keep},
    {"container-env", "NAMES", "variables that win over the image's", 1, ENVIRONMENT, keep},
    SPANK_OPTIONS_TABLE_END};

int slurm_spank_init(spank_t spank, int count, char **arguments)
{
    (void)count;
    (void)arguments;
    for (int i = 0; i < COUNT; i++)
        spank_option_register(spank, &options[i]);
    return ESPANK_SUCCESS;
}

int slurm_spank_user_init(spank_t spank, int count, char **arguments)
{
    (void)count;
    (void)arguments;
    for (int i = 0; i < COUNT; i++)
        if (values[i])
            spank_setenv(spank, variables[i], values[i], 1);
    return ESPANK_SUCCESS;
}
