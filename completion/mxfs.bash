# Part of MXFS; put in place by mxfs install. Completion of mxfs, mkfs.mxfs and fsck.mxfs for bash 4 or later, by itself:
# the package bash-completion only loads it when the command is first typed. Or: source mxfs.bash in ~/.bashrc.

# What each command takes. Operands: volume, node, device, dir, lab (the folder of a lab), labnode.
declare -gA _mxfs_options=(
    [status]="--json --run-dir"
    [top]="--interval --count --json --run-dir"
    [locks]="--json --run-dir"
    [info]="--json"
    [pr]="--json --timeout"
    [fsck]="-n --json --prdev"
    [grow]="--prdev"
    [adopt]="-f --force"
    ["home move"]="--volume --run-dir"
    [evict]="--volume --run-dir"
    [sync]="--run-dir"
    [install]="--root"
    [uninstall]="--root"
    [version]=""
    ["lab up"]="--nodes --size --timeouts --fencing -o --options"
    ["lab status"]="--json"
    ["lab exec"]=""
    ["lab stop"]=""
    ["lab start"]="-o --options"
    ["lab kill"]=""
    ["lab crash"]="--process"
    ["lab partition"]=""
    ["lab heal"]=""
    ["lab move-home"]=""
    ["lab down"]="--force --purge"
)
declare -gA _mxfs_operands=(
    [status]="volume"
    [top]="volume"
    [locks]="volume"
    [info]="device"
    [pr]="device"
    [fsck]="device"
    [grow]="device"
    [adopt]="device"
    ["home move"]="node"
    [evict]="node"
    [sync]="volume"
    ["lab up"]="lab"
    ["lab status"]="lab"
    ["lab exec"]="lab labnode"
    ["lab stop"]="lab labnode"
    ["lab start"]="lab labnode"
    ["lab kill"]="lab labnode"
    ["lab crash"]="lab labnode"
    ["lab partition"]="lab labnode"
    ["lab heal"]="lab labnode"
    ["lab move-home"]="lab labnode"
    ["lab down"]="lab"
)
# Options with a value, and what it is.
declare -gA _mxfs_values=(
    [--run-dir]="dir"
    [--root]="dir"
    [--volume]="volume"
    [--prdev]="device"
    [--timeout]=""
    [--interval]=""
    [--count]=""
    [--nodes]=""
    [--size]=""
    [--timeouts]="fast default patient"
    [--fencing]="lease pr"
    [--process]="daemon fuse heartbeat"
    [-o]=""
    [--options]=""
)

# The values of fields of the daemons' status, one a line; the fields as a|b. A daemon that hangs is not waited for.
_mxfs_status() {
    MXFS_RUN_ROOT=${_mxfs_run_dir:-$MXFS_RUN_ROOT} timeout 2 mxfs status --json 2>/dev/null |
        sed -nE 's/^ *"('"$1"')": "([^"\\]+)",?$/\2/p'
}

# The block devices that begin with $1, and the folders on the way to them.
_mxfs_devices() {
    local path
    compgen -f -- "${1:-/dev/}" | while IFS= read -r path; do
        if [[ -b $path ]]; then
            printf '%s\n' "$path"
        elif [[ -d $path ]]; then
            printf '%s/\n' "$path"
        fi
    done
}

# Sets COMPREPLY from the lines of standard input that begin with $1.
_mxfs_reply() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        [[ $line == "$1"* ]] && COMPREPLY+=("$(printf '%q' "$line")")
    done
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]]; then
        compopt -o nospace 2>/dev/null
    fi
}

# Sets COMPREPLY for an operand or value of kind $1, with what is typed of it in $2.
_mxfs_complete() {
    local kind=$1 cur=$2
    case $kind in
        volume) _mxfs_reply "$cur" < <(_mxfs_status 'volume|label|device|mountpoint') ;;
        node) _mxfs_reply "$cur" < <(_mxfs_status name) ;;
        device) _mxfs_reply "$cur" < <(_mxfs_devices "$cur") ;;
        dir | lab) _mxfs_reply "$cur" < <(compgen -d -S / -- "$cur") ;;
        labnode) _mxfs_reply "$cur" < <(cd "$_mxfs_lab" 2>/dev/null && compgen -G 'n[0-9]*') ;;
        *) _mxfs_reply "$cur" < <(compgen -W "$kind" -- "$cur") ;;
    esac
}

_mxfs() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local -a typed=() kinds=()
    local at command _mxfs_run_dir="" _mxfs_lab=""
    COMPREPLY=()
    # What was typed before, without options and their values.
    for ((at = 1; at < COMP_CWORD; at++)); do
        if [[ ${COMP_WORDS[at]} == -- ]]; then
            return # a command of the user's own
        elif [[ ${COMP_WORDS[at]} == -* ]]; then
            if [[ -v _mxfs_values[${COMP_WORDS[at]}] ]]; then
                [[ ${COMP_WORDS[at]} == --run-dir ]] && _mxfs_run_dir=${COMP_WORDS[at + 1]}
                ((++at))
            fi
        else
            typed+=("${COMP_WORDS[at]}")
        fi
    done
    case ${typed[0]} in
        "")
            _mxfs_reply "$cur" < <(printf '%s\n' "${!_mxfs_options[@]}" | cut -d' ' -f1 | sort -u)
            return
            ;;
        home | lab)
            command=${typed[0]}
            if ((${#typed[@]} == 1)); then
                _mxfs_reply "$cur" < <(printf '%s\n' "${!_mxfs_options[@]}" | sed -n "s/^$command //p" | sort)
                return
            fi
            command+=" ${typed[1]}"
            typed=("${typed[@]:2}")
            _mxfs_lab=${typed[0]}
            ;;
        *)
            command=${typed[0]}
            typed=("${typed[@]:1}")
            ;;
    esac
    [[ -v _mxfs_options[$command] ]] || return
    if [[ -v _mxfs_values[$prev] && " ${_mxfs_options[$command]} " == *" $prev "* ]]; then
        _mxfs_complete "${_mxfs_values[$prev]}" "$cur"
    elif [[ $cur == -* ]]; then
        _mxfs_complete "${_mxfs_options[$command]} --help" "$cur"
    else
        read -ra kinds <<<"${_mxfs_operands[$command]}"
        [[ -n ${kinds[${#typed[@]}]} ]] && _mxfs_complete "${kinds[${#typed[@]}]}" "$cur"
    fi
}

_mkfs_mxfs() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} word
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == -- ]] && return # options of mkfs.xfs
    done
    case $prev in
        -L | --label | --lockspace-size) return ;;
    esac
    if [[ $cur == -* ]]; then
        _mxfs_complete "-f --force -L --label --lockspace-size --help" "$cur"
    else
        _mxfs_complete device "$cur"
    fi
}

_fsck_mxfs() {
    local cur=${COMP_WORDS[COMP_CWORD]}
    if [[ $cur == -* ]]; then
        _mxfs_complete "-n --json --prdev -a -p -y -f -r -V -C --help" "$cur"
    else
        _mxfs_complete device "$cur"
    fi
}

complete -F _mxfs mxfs
complete -F _mkfs_mxfs mkfs.mxfs
complete -F _fsck_mxfs fsck.mxfs
